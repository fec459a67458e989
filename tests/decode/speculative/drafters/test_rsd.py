"""Recursive speculative decoding: beams without replacement, and the law of what is written."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling, draw
from decode.core.streams import fold_in
from decode.speculative.accept import Match, SpeculativeSampling, TraversalVerification, Verdict
from decode.speculative.components import DraftModelBeam
from decode.speculative.contracts import Context, Proposal
from decode.speculative.controller import Controller
from decode.speculative.drafters.expansion import expand
from decode.speculative.drafters.rsd import beams, conditioned
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.tree import branching
from tests.lib.speculation import check_statistics, run, texts
from tests.lib.tiers import more

V = 4
TEMPERATURE = 0.7
DRAFT, TARGET = (
    np.random.default_rng(seed).normal(0, 1.2, (V + 1, V)).astype(np.float32) for seed in (1, 2)
)  # logits behind a token; V: at the beginning
Q, P = (np.asarray(jax.nn.softmax(logits / TEMPERATURE), np.float64) for logits in (DRAFT, TARGET))


def keys(seed, num):
    return jax.random.key_data(jax.random.split(jax.random.key(seed), num))


def context(num, sampling=None):
    return Context(
        params={}, tokens=jnp.full((num, 1), V), length=jnp.ones(num, jnp.int32),
        key=keys(1, num),
        sampling=sampling or Sampling(TEMPERATURE), active=jnp.ones(num, bool), cache=None,
    )  # fmt: skip


def draft_beams(width, levels, context, is_sampled=True):
    score = lambda tokens, parents, depths, nodes: jnp.asarray(DRAFT)[tokens[:, jnp.array(nodes)]]
    return beams(width, levels, context, score, is_sampled)


def draft_branches(context):
    score = lambda tokens, nodes: jnp.asarray(DRAFT)[tokens[:, jnp.array(nodes)]]
    return expand(branching(2, 2), context, score, is_sampled=True)


draft_rsd_c, draft_rsd_s = jax.jit(draft_branches), jax.jit(draft_beams, static_argnums=(0, 1, 3))


def test_shapes_that_branch_alike():
    assert branching(2, 1).parents == (0, 0, 1, 2) and branching(2, 1).ranks == (0, 1, 0, 0)
    assert branching().num_nodes == 1 and branching(3, 1, 1).num_nodes == 10
    with pytest.raises(ValueError, match=r"counts=\(2, 0\) must be at least 1 each"):
        branching(2, 0)


@pytest.mark.parametrize("num", [20_000, *more(200_000)])
def test_beams_are_sequences_drawn_without_replacement(num):
    """The two last beams, in order, against q(s1) q(s2) / (1 - q(s1)) over all pairs of tokens."""
    tree = jax.device_get(draft_rsd_s(2, 2, context(num)))
    assert tree.is_valid.all() and tree.drawn == "without"
    parents = tree.parents[:, 3:]
    assert (tree.parents[:, :3] == [-1, 0, 0]).all() and ((parents == 1) | (parents == 2)).all()
    first = np.take_along_axis(tree.tokens, parents, axis=1)
    codes = first * V + tree.tokens[:, 3:]
    counts = np.bincount(codes[:, 0] * V * V + codes[:, 1], minlength=V**4)
    q = (Q[V][:, None] * Q[:V]).reshape(-1)
    expected = num * q[:, None] * q[None] / (1 - q[:, None]) * (1 - np.eye(V * V))
    expected = expected.reshape(-1)
    assert counts[expected == 0].sum() == 0
    large = expected > 5
    limit = large.sum() + 4.5 * np.sqrt(2 * large.sum())
    assert ((counts - expected)[large] ** 2 / expected[large]).sum() < limit
    laws = np.take_along_axis(Q[None, tree.tokens[0]], np.arange(5)[None, :, None], axis=1)
    np.testing.assert_allclose(tree.probs[0, :3], laws[0, :3], atol=1e-5)


def test_the_largest_of_the_children_is_the_parent():
    """And others are below it; what cannot come never does."""
    rng = np.random.default_rng(0)
    noisy = rng.normal(0, 3, (200, 6)).astype(np.float32)
    noisy[::2, 2] = -np.inf
    most = rng.normal(0, 3, 200).astype(np.float32)
    found = np.asarray(conditioned(jnp.asarray(noisy), jnp.asarray(most)))
    np.testing.assert_allclose(found.max(axis=1), most, atol=1e-5)
    assert (found[::2, 2] == -np.inf).all() and not np.isnan(found).any()
    assert (found.argsort(axis=1) == noisy.argsort(axis=1)).all()


def test_where_nothing_is_drawn_they_are_the_most_probable_beams():
    greedy = jax.device_get(draft_rsd_s(3, 2, context(1, Sampling(None))))
    same = jax.device_get(draft_rsd_s(3, 2, context(1), False))
    log_q = lambda logits: np.asarray(jax.nn.log_softmax(logits))
    values = log_q(DRAFT[V])[:, None] + log_q(DRAFT[:V])
    kept = np.argsort(-log_q(DRAFT[V]))[:3]
    every = [(int(a), b) for a, b in itertools.product(kept, range(V))]
    expected = sorted(every, key=lambda way: -values[way])[:3]
    for tree in (greedy, same):
        assert tree.drawn == "none" and tree.probs is None
        tokens, parents = tree.tokens[0], tree.parents[0]
        assert tokens[1:4].tolist() == kept.tolist()
        assert [(tokens[parents[v]], tokens[v]) for v in (4, 5, 6)] == expected


def test_tokens_that_are_ruled_out_are_no_beams():
    """Of two tokens there are two beams, then four: the fifth does not exist."""
    tree = jax.device_get(draft_rsd_s(4, 2, context(50, Sampling(TEMPERATURE, top_k=2))))
    assert tree.is_valid.sum(axis=1).tolist() == [1 + 2 + 4] * 50
    assert (tree.is_valid[:, [1, 2]]).all() and not tree.is_valid[:, [3, 4]].any()


# ---- What is written --------------------------------------------------------------------------


def as_it_is(tree):
    return tree


def first_ones(tree):
    """Only some nodes are judged: in even rows a level and a half, in odd rows the first one."""
    is_even = jnp.arange(len(tree.tokens))[:, None] % 2 == 0
    return tree.replace(is_valid=tree.is_valid & (jnp.arange(5)[None] < jnp.where(is_even, 4, 2)))


def only_forks(tree):
    """Wrong: what has one child is not judged, as has a token with a sure continuation."""
    num = (tree.parents[:, None] == jnp.arange(5)[None, :, None]).sum(axis=2)
    is_fork = (num > 1) | (tree.depths == 0)
    above = jnp.take_along_axis(is_fork, jnp.maximum(tree.parents, 0), axis=1)
    return tree.replace(is_valid=jnp.where(tree.depths == 2, above, is_fork))


def sorted_siblings(tree):
    """Wrong: siblings are tested by the draft's probability, not in the order they were drawn."""
    rows, pair = jnp.arange(len(tree.tokens))[:, None], tree.tokens[:, 1:3]
    order = jnp.argsort(-tree.probs[rows, 0, pair], axis=1)
    place = 1 + jnp.argsort(order, axis=1)
    below = jnp.take_along_axis(place, tree.parents[:, 3:] - 1, axis=1)
    tokens = tree.tokens.at[:, 1:3].set(jnp.take_along_axis(pair, order, axis=1))
    laws = tree.probs.at[:, 1:3].set(tree.probs[rows, 1 + order])
    parents = tree.parents.at[:, 3:].set(below.astype(jnp.int32))
    return tree.replace(tokens=tokens, parents=parents, probs=laws)


def not_normalised(tree):
    """Wrong: behind a rejection the draft's law is what it was."""
    return tree.replace(drawn="with")


def tempered_twice(tree):
    """Wrong: the law in the ratio is that of another temperature."""
    return tree.replace(probs=Sampling(TEMPERATURE).probs(jnp.log(tree.probs)))


def two_tokens(rule, kind, change, num):
    """Of `num` rounds: the first two tokens as one number, and how many drafts were accepted."""
    return _two_tokens(context(num), keys(7, num), rule, kind, change)


@functools.partial(jax.jit, static_argnames=("rule", "kind", "change"))
def _two_tokens(asked, key, rule, kind, change):
    tree = draft_beams(2, 2, asked) if kind == "S" else draft_branches(asked)
    tree = change(tree)
    laws = jnp.asarray(P, jnp.float32)[tree.tokens]
    verdict = Verdict(tree, draw(fold_in(key, 1), laws), laws, fold_in(key, 2))
    walk = rule.walk(verdict, 2)
    tokens = jnp.take_along_axis(tree.tokens, walk.path, axis=1)
    first = jnp.where(walk.num_accepted >= 1, tokens[:, 1], walk.bonus)
    later = draw(fold_in(key, 3), jnp.asarray(P, jnp.float32)[first])
    second = jnp.where(walk.num_accepted == 1, walk.bonus, later)
    second = jnp.where(walk.num_accepted == 2, tokens[:, 2], second)
    return first * V + second, walk.num_accepted


def chi_square(rule, kind, change, num):
    codes, accepted = two_tokens(rule, kind, change, num)
    expected = num * (P[V][:, None] * P[:V]).reshape(-1)
    assert expected.min() > 5 and float(accepted.mean()) > 0.1
    counts = np.bincount(np.asarray(codes), minlength=V * V)
    return ((counts - expected) ** 2 / expected).sum()


LIMIT = 45.0  # chi-square with 15 degrees of freedom exceeds it once in 12,000 times
RULES = [SpeculativeSampling(), TraversalVerification(), Match()]


@pytest.mark.parametrize(
    ("kind", "rule", "num"),
    [
        *itertools.product("SC", RULES[:2], [20_000]),
        *more(*itertools.product("SC", RULES, [200_000])),
    ],
)
def test_the_text_follows_the_targets_law(kind, rule, num):
    assert chi_square(rule, kind, as_it_is, num) < LIMIT


@pytest.mark.parametrize(
    ("rule", "num"),
    [(RULES[0], 20_000), *more((RULES[0], 200_000), (RULES[1], 200_000), (RULES[2], 200_000))],
)
def test_the_first_beams_follow_the_targets_law(rule, num):
    assert chi_square(rule, "S", first_ones, num) < LIMIT


@pytest.mark.parametrize("change", [sorted_siblings, not_normalised, *more(tempered_twice)])
@pytest.mark.parametrize("kind", ["S", *more("C")])
@pytest.mark.parametrize("rule", [RULES[0], *more(RULES[1])])
@pytest.mark.exhaustive
def test_wrong_variants_are_noticed(kind, rule, change):
    assert chi_square(rule, kind, change, 20_000) > LIMIT


@pytest.mark.parametrize("rule", [RULES[0], *more(RULES[1])])
def test_a_choice_by_the_shape_that_was_drawn_is_noticed(rule):
    assert chi_square(rule, "S", only_forks, 20_000) > LIMIT


def test_from_the_leaves_up_more_is_accepted():
    means = [float(two_tokens(rule, "S", as_it_is, 20_000)[1].mean()) for rule in RULES]
    assert means[1] > means[0] > means[2]


# ---- In the loop ------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_the_most_probable_beams_of_the_target_itself_are_its_text(plain, toy_params):
    """Of all its layers, greedy: every draft is right, in every tree."""
    cfg, prompts, rows, _ = plain
    drafter = DraftModelBeam(toy_params, cfg, width=2, levels=3, is_sampled=True)
    state = run(toy_params, cfg, SpeculativeMethod(drafter), prompts[:8])
    assert texts(state, 8) == rows[:8]
    histogram = np.asarray(state.acceptance_histogram).sum(axis=0)
    assert histogram[3] > 0.6 * histogram.sum()


@pytest.mark.parametrize("width", [4, *more(1, 2, 6)])
def test_a_controller_looks_at_no_shape_that_was_drawn(width):
    """Of two rounds that differ in what was drawn it chooses the same nodes, the first ones."""
    drafter = DraftModelBeam({}, None, width=2, levels=3, is_sampled=True)
    controller = Controller(widths=(1, width, 7), costs=jnp.array([1.0, 1.0, 1.01, 1.2]))
    tree = draft_rsd_s(2, 3, context(40))
    assert len(np.unique(np.asarray(tree.parents), axis=0)) > 2
    proposal = Proposal(tree, jnp.zeros(40, jnp.int32), ())
    state = controller.init(drafter, 40)
    hits = np.zeros(state.hits.shape, np.float32)  # of the first children and the second
    hits[..., 0], hits[..., 1] = [3, 2, 3], [1, 0, 0]
    state = state.replace(hits=jnp.asarray(hits), tries=jnp.full_like(state.tries, 4.0))

    @jax.jit
    def looks(proposal, state):
        active = jnp.ones(40, bool)
        return controller.reach(state, proposal, 3), controller.choose(
            drafter, state, proposal, active
        )

    reach, (choice, nodes) = jax.device_get(looks(proposal, state))
    assert (reach == reach[:1]).all() and (reach[0, 1::2] > reach[0, 2::2]).all()
    assert (np.asarray(nodes) == np.arange(7)).all() and 1 <= int(choice) <= 3


@pytest.mark.parametrize("rule", [RULES[0], *more(RULES[1])])
@pytest.mark.exhaustive
def test_drawn_beams_go_with_a_controller(plain, toy_params, rule):
    """Which judges a level, or one and a half."""
    cfg, prompts, _, _ = plain
    drafter = DraftModelBeam(toy_params, cfg, width=2, levels=2, is_sampled=True, layers=(0,))
    for fixed in (1, 2):
        controller = Controller(widths=(3, 4), costs=np.float32([1, 1, 1]), fixed=fixed)
        method = SpeculativeMethod(drafter, rule, Sampling(0.7), controller=controller)
        state = run(toy_params, cfg, method, prompts[:8])
        check_statistics(state, 2)
        rounds = np.asarray(state.control.rounds).sum(axis=0)
        accepted = np.asarray(state.acceptance_histogram).sum(axis=0)
        assert rounds[fixed] == rounds.sum() and (accepted[2] > 0) == (fixed == 2)


def test_more_beams_than_tokens_are_refused(toy_cfg, toy_params):
    wide = DraftModelBeam(toy_params, toy_cfg, width=toy_cfg.vocab_size + 1)
    with pytest.raises(ValueError, match=f"must be at most vocab_size={toy_cfg.vocab_size}"):
        wide.validate(toy_cfg)
