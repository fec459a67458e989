"""Dream's schedule, and its random choice of positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import FixedBlocks, NegEntropy
from decode.diffusion.confidences.tempered import Tempered
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.diffusion.rules.dream_quota import DreamQuota
from tests.lib.rounds import committed, make_round
from tests.lib.tiers import more

commit = jax.jit(lambda rule, view: rule.commit(view, ())[0] & view.eligible)


def commit_counts(rule, n):
    """What is committed step by step, until n masks are gone."""
    view, counts = make_round(np.linspace(0.1, 0.9, n)), []
    while view.eligible.any():
        done = commit(rule, view.replace(block_step=jnp.array([len(counts)])))
        counts.append(int(done.sum()))
        view = view.replace(eligible=view.eligible & ~done)
    return counts


def drawn(rule, confidence, seed=0, **changes):
    """[B, W] bool, the commits of a round whose every position has its own random stream."""
    view = make_round(confidence, **changes)
    bits = jax.random.bits(jax.random.key(seed), (*view.tokens.shape, 2), jnp.uint32)
    return np.asarray(commit(rule, view.replace(noise_key=bits)))


def softmax(x):
    p = np.exp(x - np.max(x))
    return p / p.sum()


@pytest.mark.parametrize("n", [13, 64, *more(8, 512)])
def test_as_many_steps_as_tokens(n):
    """Card, check 3."""
    assert commit_counts(DreamQuota(n, may_idle=True), n) == [0, *[1] * (n - 2), 2]
    assert commit_counts(DreamQuota(n), n) == [1] * n


@pytest.mark.exhaustive(every=4)
def test_fewer_steps_than_tokens():
    """Card, check 3, and §2 for 1024 steps."""
    assert commit_counts(DreamQuota(32, may_idle=True), 256) == [7, *[8] * 30, 9]
    many = commit_counts(DreamQuota(1024, may_idle=True), 1024)
    assert (len(many), many[-1], sorted(many)[:3]) == (1024, 3, [0, 0, 1])
    assert commit_counts(DreamQuota(1, eps=0.9), 20) == [20]
    # Times 1, 0.875, 0.75, 0.625: 20 / 8, 18 / 7 and 16 / 6 rounded down, and the rest.
    assert commit_counts(DreamQuota(4, eps=0.5), 20) == [2, 2, 2, 14]


@pytest.mark.parametrize("units", ["probability", "nats"])
def test_alg_temp_towards_zero_is_top_k(units):
    """Card, check 4."""
    rng = np.random.default_rng(0)
    confidence, eligible = rng.uniform(0.01, 0.99, (16, 24)), rng.random((16, 24)) < 0.7
    view = make_round(confidence, eligible=eligible)
    for steps in (2, 4, 24):
        surest = committed(DreamQuota(steps), view)
        for alg_temp in (0.0, 1e-7):
            rule = DreamQuota(steps, alg_temp=alg_temp, alg_temp_units=units)
            picks = drawn(rule, confidence, eligible=eligible)
            assert [np.flatnonzero(row).tolist() for row in picks] == surest


@pytest.mark.parametrize(
    ("units", "alg_temp"), [("probability", 0.3), ("probability", 5.0), ("nats", 0.7)]
)
def test_one_position_is_drawn_with_softmax_of_confidence_over_alg_temp(units, alg_temp):
    n, published = 8192, np.array([0.9, 0.2, 0.6, 0.5, 0.05, 0.7])
    eligible = np.array([True, True, False, True, True, True])
    c = published if units == "probability" else np.log(published)
    p = np.where(eligible, softmax(np.where(eligible, c / alg_temp, -np.inf)), 0)
    rule = DreamQuota(6, alg_temp=alg_temp, alg_temp_units=units)
    confidence, eligible = np.tile(published, (n, 1)), np.tile(eligible, (n, 1))
    picks = drawn(rule, confidence, eligible=eligible)
    assert (picks.sum(axis=1) == 1).all() and not picks[:, 2].any()
    expected = n * p[p > 0]
    chi2 = ((picks.sum(axis=0)[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 23.6  # 4 degrees of freedom: the 0.9999 quantile is 23.5


def test_several_positions_are_drawn_without_replacement():
    n, c, alg_temp = 8192, np.array([0.9, 0.2, 0.6, 0.5, 0.05]), 0.4
    picks = drawn(DreamQuota(2, alg_temp=alg_temp), np.tile(c, (n, 1)))
    assert (picks.sum(axis=1) == 2).all()
    p = softmax(c / alg_temp)
    chi2 = 0.0
    for i, j in itertools.combinations(range(5), 2):
        expected = n * p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j]))
        chi2 += ((picks[:, i] & picks[:, j]).sum() - expected) ** 2 / expected
    assert chi2 < 33.8  # 9 degrees of freedom: the 0.9999 quantile is 33.7


@pytest.mark.parametrize("may_idle", [False, True])
def test_random_choice_keeps_the_counts(may_idle):
    rule = DreamQuota(32, alg_temp=0.5, may_idle=may_idle)
    for n in (20, 256):
        plain = commit_counts(rule.replace(alg_temp=None), n)
        assert commit_counts(rule, n) == plain


def test_the_position_that_saves_an_idle_step_is_drawn_too():
    n, c = 4096, np.array([0.9, 0.1, 0.5])
    picks = drawn(DreamQuota(3, alg_temp=1.0), np.tile(c, (n, 1)))  # floor(3 * 0.333) = 0
    np.testing.assert_allclose(picks.mean(axis=0), softmax(c), atol=0.04)


def test_rows_without_masks_commit_nothing():
    view = make_round(np.full((2, 4), 0.5), eligible=[[True] * 4, [False] * 4])
    assert committed(DreamQuota(2, alg_temp=0.5), view)[1] == []
    assert committed(DreamQuota(2), view)[1] == []


@pytest.mark.exhaustive(every=4)
def test_random_order_through_the_loop(toy_cfg, toy_params):
    """Seeds decide the order, and a row alone draws what it draws in a batch."""
    method = DiffusionMethod(
        FixedBlocks(None), confidence=Tempered(NegEntropy()),
        rule=DreamQuota(6, alg_temp=0.5, alg_temp_units="nats"),
    )  # fmt: skip

    def orders(seeds, **options):
        state = init_state(
            toy_cfg, method, [[1, 2]] * len(seeds), gen_len=6, seeds=seeds, **options
        )
        return np.asarray(decode(toy_params, toy_cfg, method, state).step_map).tolist()

    together = orders([0, 1, 2, 3], prompt_len=5)
    assert len(set(map(tuple, together))) > 1
    assert orders([2]) == [together[2]]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (DreamQuota(eps=0.0), "eps=0 must be in"),
        (DreamQuota(alg_temp=-1.0), "alg_temp=-1 must be at least 0, or None"),
        (DreamQuota(alg_temp_units="bits"), "alg_temp_units='bits' must be 'probability' or"),
    ],
)
def test_bad_values_are_refused(toy_cfg, rule, message):
    with pytest.raises(ValueError, match=message):
        rule.validate(toy_cfg)
