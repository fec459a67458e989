"""DelayedCache against an oracle that keeps keys and values per position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.diffusion.caches import delayed_cache
from decode.diffusion.caches.delayed_cache import DelayedCache
from decode.diffusion.components import (
    EosBlock,
    FixedBlocks,
    NarrowOut,
    NoCache,
    Prophet,
    Quota,
    Threshold,
)
from decode.diffusion.contracts import Reviser
from decode.diffusion.inputs.smoothing import Smoothing
from decode.diffusion.inputs.uniform_noise import UniformNoise
from decode.diffusion.loop import DiffusionMethod, init_state, step, stream
from decode.diffusion.round import Revision
from decode.diffusion.stoppers.eotp import Eotp
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS, assert_same, run
from tests.lib.models import spread
from tests.lib.tiers import more
from tests.lib.weights import init_params


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("refresh_every", "block_len", "rule", "guidance"),
    [
        (3, 12, ("threshold", 0.6), None),
        (2, 4, ("quota", 4), 0.5),
        *more((100, 12, ("quota", 12), None)),
    ],
)
def test_a_ragged_batch_equals_the_oracle_row_by_row(
    toy_model, refresh_every, block_len, rule, guidance
):
    cfg, params = toy_model
    name, value = rule
    method = DiffusionMethod(
        FixedBlocks(block_len),
        DelayedCache(refresh_every, num_lengths=2),
        rule={"threshold": Threshold, "quota": Quota}[name](value),
        guidance=guidance,
    )
    state = run(params, cfg, method, prompt_len=8)
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        expected = oracle.decode(
            oracle.Model(params, cfg),
            prompt,
            length,
            rule=rule,
            scheduler=("fixed", block_len),
            cache=("delayed", refresh_every),
            guidance=guidance,
            banned=(cfg.mask_token_id,),
        )
        assert state.tokens[b, 8 : 8 + length].tolist() == expected["tokens"]
        assert state.step_map[b, :length].tolist() == expected["step_map"]
        assert int(state.num_forwards[b]) == expected["num_forwards"]
        np.testing.assert_allclose(
            state.confidence[b, :length], expected["confidence"], atol=2e-3, rtol=2e-3
        )


POINTS = {
    "plain": {"rule": Threshold(0.5)},
    "smoothed": {"rule": Threshold(0.5), "inputs": Smoothing()},
    "eotp": {"rule": Threshold(0.5), "stopper": Eotp(eot_id=8)},
}


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("point", ["smoothed", "eotp", *more("plain")])
def test_refreshed_in_every_round_it_is_exact(toy_cfg, toy_params, point):
    cfg, params = toy_cfg, toy_params
    method = DiffusionMethod(FixedBlocks(4)).replace(**POINTS[point])
    exact = run(params, cfg, method.replace(cache=NoCache()))
    assert_same(run(params, cfg, method.replace(cache=DelayedCache(1, num_lengths=1))), exact)


@pytest.mark.exhaustive
def test_the_lengths_change_no_result(toy_model):
    cfg, params = toy_model
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.5), temperature=0.5)
    one, two, many = (
        run(params, cfg, method.replace(cache=DelayedCache(3, num_lengths=n)), batch_size=batch)
        for n, batch in ((1, 4), (2, 8), (4, 4))
    )
    for state in (two, many):
        for field in ("tokens", "step_map", "num_forwards"):
            got, expected = getattr(state, field)[:4], getattr(one, field)
            np.testing.assert_array_equal(got, expected, field)


def test_a_token_is_cached_one_step_after_it_is_decided(toy_cfg, toy_params):
    """The prompt in round 0; what round r decides by round r + 1; everything again in round 5."""
    method = DiffusionMethod(FixedBlocks(None), DelayedCache(5, num_lengths=1), rule=Quota(12))
    first = init_state(toy_cfg, method, [PROMPTS[2]], gen_len=12)
    ages = []
    for r, state in enumerate(stream(toy_params, toy_cfg, method, first)):
        cached = np.asarray(state.cache.cached[0]) >= 0
        assert cached[:6].all()
        decided_before = (np.asarray(state.step_map[0]) >= 0) & (np.asarray(state.step_map[0]) < r)
        np.testing.assert_array_equal(cached[6:], decided_before)
        assert int(state.cache.num_cached[0]) == cached.sum() == 6 + r
        ages.append(int(state.cache.age[0]))
    assert ages == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]


@pytest.mark.exhaustive(every=4)
def test_short_rounds_are_short(toy_cfg, monkeypatch):
    """T is the shortest compiled length that holds what the longest row needs."""
    seen, real = [], delayed_cache.forward

    def spy(params, cfg, window, slots):
        width = window.tokens.shape[1]
        jax.debug.callback(lambda: seen.append(width))  # in the branch that is taken
        return real(params, cfg, window, slots)

    monkeypatch.setattr(delayed_cache, "forward", spy)
    method = DiffusionMethod(FixedBlocks(None), DelayedCache(100), rule=Quota(6))
    toy_cfg = dataclasses.replace(toy_cfg, n_layers=1)
    params = spread(init_params(jax.random.key(3), toy_cfg))
    state = init_state(toy_cfg, method, [[1, 2, 3], [4, 5]], gen_len=4, prompt_len=5)
    run = jax.jit(step, static_argnames="cfg")
    while not bool(state.has_stopped.all()):
        state = run(params, cfg=toy_cfg, method=method, state=state)
        jax.effects_barrier()
    # 9 positions; then 4, 3, 2 of 4, 4, 2: what is undecided, and what was decided last.
    assert seen == [9, 4, 4, 2]


@struct.dataclass
class ChangeOnce(Reviser):
    """In its row's fourth round, takes back what was decided before, or replaces it."""

    replace_it: bool = struct.field(pytree_node=False)

    def revise(self, view, commit, state):
        decided = view.in_block & ~view.undecided & (view.row_step == 3)[:, None]
        if self.replace_it:
            return Revision(commit | decided), state
        return Revision(commit, take_back=decided), state


@pytest.mark.parametrize("replace_it", [False, True])
def test_a_cached_token_that_changes_is_not_read_again(toy_cfg, toy_params, replace_it):
    method = DiffusionMethod(
        FixedBlocks(None), DelayedCache(100, num_lengths=1), rule=Threshold(1.0)
    )
    method = method.replace(reviser=ChangeOnce(replace_it))
    first = init_state(toy_cfg, method, [[4]], gen_len=6)
    history = []
    for state in stream(toy_params, toy_cfg, method, first):
        cached, tokens = np.asarray(state.cache.cached[0]), np.asarray(state.tokens[0])
        history.append((int(state.cache.age[0]), cached, tokens))
    changed = [
        bool(((cached >= 0) & (cached != tokens)).any()) for _, cached, tokens in history[:-1]
    ]
    assert any(changed)
    for was_stale, (age, _, _) in zip(changed, history[1:], strict=True):
        assert (age == 1) == was_stale


def test_what_a_cut_drops_is_not_read_again(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(None), DelayedCache(100, num_lengths=1), rule=Quota(12))
    method = method.replace(stopper=Eotp("committed", eot_id=8))
    first = init_state(toy_cfg, method, PROMPTS, gen_len=12)
    dropped, was_stale = 0, np.zeros(len(PROMPTS), bool)
    for state in stream(toy_params, toy_cfg, method, first):
        place = np.arange(state.tokens.shape[1])
        behind = place >= np.asarray(state.end)[:, None]
        stale = ((np.asarray(state.cache.cached) >= 0) & behind).any(axis=1)
        stale &= ~np.asarray(state.has_stopped)
        assert (np.asarray(state.cache.age)[was_stale] == 1).all()
        was_stale = stale
        dropped += stale.sum()
    assert dropped > 0


def test_every_number_but_the_lengths_is_data():
    assert len(jax.tree.leaves(DelayedCache(jnp.int32(4)))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": DelayedCache(0)}, "refresh_every=0 must be at least 1"),
        ({"cache": DelayedCache(num_lengths=0)}, "num_lengths=0 must be at least 1"),
        ({"reviser": NarrowOut(0.5)}, "NarrowOut asks what the model predicts where a token"),
        ({"stopper": Prophet(0)}, "Prophet must see the whole canvas, but DelayedCache"),
        ({"inputs": UniformNoise()}, "UniformNoise shows something else: use another cache"),
        ({"lookahead": 2}, "which DelayedCache does not allow"),
    ],
)
def test_refusals(toy_cfg, changes, message):
    method = DiffusionMethod(cache=DelayedCache()).replace(**changes)
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)
    init_state(toy_cfg, DiffusionMethod(cache=DelayedCache(), stopper=EosBlock()), [[1]], gen_len=4)
