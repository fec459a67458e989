"""VicinityCache against an oracle that says which keys are fresh, and against its two extremes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.caches.vicinity_cache import VicinityCache
from decode.diffusion.components import (
    DualCache,
    FixedBlocks,
    NarrowOut,
    NoCache,
    Prophet,
    Quota,
    Threshold,
)
from decode.diffusion.inputs.smoothing import Smoothing
from decode.diffusion.loop import DiffusionMethod, decode, init_state, stream
from tests.lib import oracle
from tests.lib.batches import LENGTHS, PROMPTS, assert_same, run
from tests.lib.tiers import more


@pytest.mark.parametrize(
    ("before", "after", "rule", "guidance"),
    [
        (2, 3, ("threshold", 0.4), None),
        (0, 9, ("quota", 4), 0.5),
        *more((1, 0, ("quota", 3), None)),
    ],
)
def test_a_ragged_batch_equals_the_oracle_row_by_row(toy_model, before, after, rule, guidance):
    cfg, params = toy_model
    name, value = rule
    method = DiffusionMethod(
        FixedBlocks(4),
        VicinityCache(before=before, after=after),
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
            scheduler=("fixed", 4),
            cache=("vicinity", before, after),
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
    "guided": {"rule": Quota(3), "guidance": 0.5},
    "smoothed": {"rule": Threshold(0.5), "inputs": Smoothing()},
    "shadow": {"rule": Threshold(0.3), "reviser": NarrowOut(0.6)},
}


def build(point, cfg):
    if point == "shadow" and cfg.shifted_logits:
        pytest.skip("NarrowOut refuses models with shifted logits")
    return DiffusionMethod(FixedBlocks(4)).replace(**POINTS[point])


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("point", ["guided", *more("smoothed", "shadow")])
def test_without_a_vicinity_it_is_the_dual_cache(toy_model, point):
    cfg, params = toy_model
    method = build(point, cfg)
    none = method.replace(cache=VicinityCache(before=0, after=0))
    a = run(params, cfg, none)
    b = run(params, cfg, method.replace(cache=DualCache()))
    assert_same(a, b)
    np.testing.assert_array_equal(a.confidence, b.confidence)  # to the last bit


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("point", ["smoothed", *more("guided", "shadow")])
def test_with_everything_in_the_vicinity_nothing_is_stale(toy_model, point):
    cfg, params = toy_model
    method = build(point, cfg)
    whole = method.replace(cache=VicinityCache(before=20, after=20))
    exact = run(params, cfg, method.replace(cache=NoCache()))
    assert_same(run(params, cfg, whole), exact)
    dual = run(params, cfg, method.replace(cache=DualCache()))
    assert not np.allclose(dual.confidence, exact.confidence, atol=1e-3)  # it does matter


def test_one_full_forward_per_block(toy_cfg, toy_params):
    """Only a full forward changes the cache; a window's does not, not even in the vicinity."""
    method = DiffusionMethod(FixedBlocks(4), VicinityCache(before=4, after=4), rule=Quota(4))
    first = init_state(toy_cfg, method, [PROMPTS[0]], gen_len=12)
    before, changes = np.asarray(first.cache.kv.k), []
    for state in stream(toy_params, toy_cfg, method, first):
        after = np.asarray(state.cache.kv.k)
        changes.append(bool((before != after).any()))
        before = after
    assert changes == [True, False, False, False] * 3


@pytest.mark.exhaustive(every=4)
def test_a_vicinity_wider_than_the_canvas_costs_no_more_than_the_canvas(toy_cfg, toy_params):
    """And `before` and `after` are part of the program, the quorum is not."""
    decode.clear_cache()
    for quorum in (0.0, 1.0):
        method = DiffusionMethod(FixedBlocks(4), VicinityCache(quorum, before=100, after=100))
        run(toy_params, toy_cfg, method)
    assert decode._cache_size() == 1
    leaves = jax.tree.leaves(VicinityCache(jnp.float32(0.5), before=1, after=2))
    assert len(leaves) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": VicinityCache(before=-1)}, "before=-1 must be at least 0"),
        ({"cache": VicinityCache(after=-2)}, "after=-2 must be at least 0"),
        ({"cache": VicinityCache(2.0)}, r"quorum=2 must be in \[0, 1\]"),
        ({"stopper": Prophet(0)}, "Prophet must see the whole canvas, but VicinityCache"),
        ({"lookahead": 2}, "which VicinityCache does not allow"),
    ],
)
def test_refusals(toy_cfg, changes, message):
    method = DiffusionMethod(cache=VicinityCache()).replace(**changes)
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)
