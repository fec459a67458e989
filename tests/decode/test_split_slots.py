"""A cache that is split over devices by its slots stays where it is, in both loops."""

import dataclasses

import jax
import pytest

from decode.diffusion import loop as diffusion
from decode.diffusion.components import DualCache, FixedBlocks, Threshold
from decode.speculative import loop as speculative
from decode.speculative.drafters.token_recycling import TokenRecycling
from dlm.sharding import make_mesh
from scripts.plan.collectives import collectives

PROMPT = [i % 20 for i in range(140)]


def start_diffusion(cfg, params):
    method = diffusion.DiffusionMethod(FixedBlocks(4), DualCache(), rule=Threshold(0.4))
    state = diffusion.init_state(cfg, method, [PROMPT], gen_len=8)
    return diffusion.decode, method, state, lambda state: state.cache.kv


def start_speculative(cfg, params):
    method = speculative.SpeculativeMethod(TokenRecycling())
    state = speculative.init_state(cfg, method, [PROMPT], gen_len=8)
    state = speculative.prefill(params, cfg, method, state)
    return speculative.decode, method, state, lambda state: state.cache


@pytest.mark.exhaustive(every=4)
@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")
@pytest.mark.parametrize("start", [start_diffusion, start_speculative])
def test_split_slots_do_not_travel(toy_cfg, toy_params, start):
    """Nothing as long as a device's part of the cache is sent; the loop gives it back split."""
    cfg = dataclasses.replace(toy_cfg, max_seq_len=512)
    with jax.set_mesh(make_mesh(sequence=4)):
        decode, method, state, cache = start(cfg, toy_params)
        slots = cache(state).num_slots
        assert cache(state).k.sharding.shard_shape(cache(state).k.shape)[3] == slots // 4
        compiled = decode.lower(toy_params, cfg, method, state).compile()
        moves = collectives(compiled.as_text())
        state = decode(toy_params, cfg, method, state)
        assert cache(state).k.sharding.shard_shape(cache(state).k.shape)[3] == slots // 4
    assert any(move.op == "all-reduce" for move in moves)  # the sums of attention
    for move in moves:
        dims = [int(d) for d in move.shape.partition("[")[2].rstrip("]").split(",") if d]
        assert not {slots // 4, slots} & set(dims), move
