"""What the programs of a search do: hypotheses take a row each, and only what moves is moved."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from decode.search import loop
from decode.search.components import METHODS, Beam
from decode.search.loop import SearchMethod, begin, decode, step
from dlm.cache import init_cache
from dlm.config import ModelConfig
from dlm.params import abstract_params
from tests.lib.search import point
from tests.lib.speculation import random_prompts
from tests.lib.tiers import more

P, G, CHUNK = 1024, 32, 256
# A cache that is large beside everything else.
WIDE = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=32, d_ff=24, vocab_size=24,
    max_seq_len=P + G, mask_token_id=None, eos_token_id=22, pad_token_id=21, dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize("K", [4, *more(8)])
def test_hypotheses_take_a_row_each_and_the_prompt_one(K):
    """Of memory in each program: K rows that stay, at most one beside them, and small things."""
    method, params = SearchMethod(Beam(num_beams=K)), abstract_params(WIDE)
    tokens = jax.ShapeDtypeStruct((1, P + G + 1), np.int32)
    one, key = jax.ShapeDtypeStruct((1,), np.int32), jax.ShapeDtypeStruct((1, 2), np.uint32)
    asked = (method, tokens, one, one, key)
    first = loop._begin.lower(params, WIDE, *asked, G, CHUNK)
    state = jax.eval_shape(
        lambda *asked: loop._begin(params, WIDE, *asked, G, CHUNK)
        if params is None else loop._begin.__wrapped__(asked[0], WIDE, *asked[1:], G, CHUNK),
        params, *asked,
    )  # fmt: skip
    cache = jax.eval_shape(functools.partial(init_cache, WIDE, 1, P + G + 1))
    row = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    memory = first.compile().memory_analysis()
    assert K * row <= memory.output_size_in_bytes < (K + 0.5) * row
    assert row <= memory.temp_size_in_bytes < 1.5 * row
    memory = decode.lower(params, WIDE, method, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= K * row
    assert memory.temp_size_in_bytes < 0.25 * row


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["beam_4", *more(*sorted({*METHODS} - {"beam_4"}))])
def test_prompts_that_are_done_are_left_alone(toy_cfg, toy_params, name):
    """Nothing of theirs is written, moved or counted in the rounds of others."""
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None, eos_token_id=None)
    method, prompts = point(name, cfg), random_prompts(cfg, 3)
    state = begin(toy_params, cfg, method, prompts, gen_len=12)
    state = decode(toy_params, cfg, method, state, 3)
    state = state.replace(has_stopped=state.has_stopped.at[1].set(True))
    before, K = jax.device_get(state), method.strategy.width
    after = jax.device_get(jax.jit(step, static_argnames="cfg")(toy_params, cfg, method, state))
    assert (after.length[[0, 2]] > before.length[[0, 2]]).all()

    def same(a, b):
        if np.ndim(a):  # rows of the cache are the second axis of five
            a, b = (x[:, 1 :: len(prompts)] if np.ndim(a) == 5 else x[1] for x in (a, b))
            np.testing.assert_array_equal(a, b)

    jax.tree.map(same, after, before)
    may_wait = K == 1 or len(method.strategy.widths) > 1
    assert after.num_moves.sum() > before.num_moves.sum() or may_wait
