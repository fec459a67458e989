import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import (
    EosBlock,
    Eotp,
    FixedBlocks,
    LearnedFilter,
    Margin,
    MultiBlock,
    NarrowOut,
    PrefixCache,
    Quota,
    Threshold,
    by_name,
    short_names,
)
from decode.diffusion.loop import DiffusionMethod, init_state
from dlm.heads.learn2pd import Filter, init_filter
from tests.lib.batches import assert_same, run
from tests.lib.rounds import committed, make_round
from tests.lib.tiers import more

C = 4


def threshold_filter(threshold, block_len=C):
    """sigmoid(k (c - threshold)) at every position: both sides of relu carry one sign of it."""
    k = 1e5
    eye, zeros = jnp.eye(block_len), jnp.zeros(block_len)
    return Filter(w1=eye, b1=zeros, w2=k * eye, b2=zeros - k * threshold)


CACHES = [name for name in short_names("cache") if name != "delayed"]


@pytest.mark.parametrize("cache", [CACHES[0], *more(*CACHES[1:])])
def test_an_identity_is_the_fixed_threshold(toy_cfg, toy_params, cache):
    """Card, check 2, with every cache but one that re-reads what it likes, and a ragged row."""
    method = DiffusionMethod(FixedBlocks(C), by_name("cache", cache), rule=Threshold(0.5))
    learned = method.replace(rule=LearnedFilter(threshold_filter(0.5), 0.5))
    assert_same(run(toy_params, toy_cfg, learned), run(toy_params, toy_cfg, method))


@pytest.mark.exhaustive
def test_blocks_are_found_in_wider_windows(toy_cfg, toy_params):
    """WINO's shadow shows the whole block, EoTP the suffix: the filter still sees the block."""
    for change in (
        dict(stopper=Eotp()),
        dict(reviser=NarrowOut(0.5), stopper=EosBlock()),
        dict(cache=PrefixCache(), stopper=Eotp()),
    ):
        method = DiffusionMethod(FixedBlocks(C), rule=Threshold(0.5)).replace(**change)
        learned = method.replace(rule=LearnedFilter(threshold_filter(0.5), 0.5))
        assert_same(run(toy_params, toy_cfg, learned), run(toy_params, toy_cfg, method))


def test_threshold_at_its_ends(toy_cfg, toy_params):
    """Card, check 1: 1 accepts nothing, 0 everything."""
    filter = init_filter(jax.random.key(0), C)
    method = DiffusionMethod(FixedBlocks(C), rule=LearnedFilter(filter, 1.0))
    one_by_one = run(toy_params, toy_cfg, method.replace(rule=Quota(C)))
    assert_same(run(toy_params, toy_cfg, method), one_by_one)
    everything = run(toy_params, toy_cfg, method.replace(rule=LearnedFilter(filter, 0.0)))
    assert everything.num_forwards.tolist() == [3, 3, 3, 2]


def test_what_the_filter_sees_by_hand():
    """Decided positions count with their confidence now; those beyond the row's end as 0."""
    filter = init_filter(jax.random.key(3), C)
    confidence = [0.9, 0.2, 0.6, 0.3, 0.8, 0.5]  # two positions before the block, one in front
    view = make_round(confidence, eligible=[0, 0, 0, 1, 1, 0])
    view = view.replace(
        block_start=jnp.array([2]), block_end=jnp.array([5]),
        in_block=jnp.array([[False, False, True, True, True, False]]),
    )  # fmt: skip
    seen = jnp.array([0.6, 0.3, 0.8, 0.0])
    keep = np.asarray(jax.nn.sigmoid(filter.logits(seen)))
    for threshold in (0.0, *(np.sort(keep)[:-1] + np.sort(keep)[1:]) / 2, 1.0):
        commit, _ = LearnedFilter(filter, threshold).commit(view, ())
        expected = [False] * 3 + [keep[1] > threshold, True, False]  # 0.8 is the surest
        assert commit[0].tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scheduler=FixedBlocks(8)), r"trained with blocks of 4, .* use blocks of that length"),
        (dict(scheduler=MultiBlock(4)), r"trained with blocks of 4, .* use blocks of that length"),
        (dict(confidence=Margin()), "trained with Probability as confidence, and Margin"),
        (dict(rule=LearnedFilter(init_filter(jax.random.key(0), C), 1.5)), "threshold=1.5 must"),
    ],
)
def test_what_it_was_not_trained_for_is_refused(toy_cfg, change, message):
    rule = LearnedFilter(init_filter(jax.random.key(0), C))
    method = DiffusionMethod(FixedBlocks(C), rule=rule).replace(**change)
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, method, [[1]], gen_len=4)


def test_decided_positions_are_seen():
    """What the filter says of a position depends on the confidences of decided ones, too."""
    noise = np.random.default_rng(0)
    filter = jax.tree.map(
        lambda x: noise.normal(size=x.shape).astype(np.float32), init_filter(jax.random.key(3), 4)
    )
    sure, eligible = np.array([[0.9, 0.2, 0.6, 0.4]], np.float32), [[True, False, True, False]]
    of = lambda x: float(jax.nn.sigmoid(filter.logits(jnp.asarray(x, jnp.float32)))[0, 2])
    whole, blind = of(sure), of(sure * np.array(eligible))
    assert whole != blind
    rule = LearnedFilter(filter, (whole + blind) / 2)
    assert (2 in committed(rule, make_round(sure, eligible=eligible))[0]) == (whole > blind)
