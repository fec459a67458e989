"""Acceptance rules against exactly known laws, and against deliberately wrong variants.

A toy world of V tokens: the target's law of a token depends on the one or two before it, and so
does the draft's. Many rows run one round each on a tree of depth 2, and their first two tokens are
compared with the product of the target's laws; what a round does not reach is drawn from them.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.sampling import Sampling, draw
from decode.core.streams import fold_in, uniforms
from decode.speculative.accept import (
    BlockVerification,
    Match,
    SpeculativeSampling,
    TraversalVerification,
    Typical,
    Verdict,
    Walk,
    _normalise,
)
from decode.speculative.tree import DraftTree, TreeShape, chain, from_paths
from tests.lib.paths import GOLDEN
from tests.lib.tiers import more

TRACES = GOLDEN / "medusa_tree"
V, N, MANY = 5, 50_000, 200_000  # tokens; rounds by default, and of the exhaustive tests
LIMIT = 60.0  # chi-square with 24 degrees of freedom exceeds it once in 15,000 times


def table(seed, flat):
    """[V + 1, V + 1, V]: law of a token after the two before it; V: there is none."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.dirichlet(np.full(V, flat), size=(V + 1, V + 1)), jnp.float32)


TARGET, DRAFT = table(0, 0.7), table(1, 1.5)


def keys(seed, num=N):
    return jax.random.key_data(jax.random.split(jax.random.key(seed), num))


def laws_of(table, tokens, shape):
    """[B, W, V] after each node of trees whose root is known to be alone."""
    rows = []
    for v, depth in enumerate(shape.depths):
        before = tokens[:, shape.parents[v - 1]] if depth == 2 else jnp.full(len(tokens), V)
        own = tokens[:, v] if depth else jnp.full(len(tokens), V)
        rows.append(table[before, own])
    return jnp.stack(rows, axis=1)


@functools.cache
def drafted(shape, how, seed=3, num=N):
    """Trees of depth 2 drafted from DRAFT: most probable, or drawn with or without replacement."""
    return _draft(DRAFT, keys(seed, num), shape, how)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draft(draft, key, shape, how):  # with the table inside, XLA would draft while it compiles
    num = len(key)
    tokens = jnp.full((num, shape.num_nodes), -1)
    laws = jnp.zeros((num, shape.num_nodes, V))
    for u, depth in enumerate(shape.depths):
        children = [v for v, p in enumerate(shape.parents, start=1) if p == u]
        before = tokens[:, shape.parents[u - 1]] if depth == 2 else jnp.full(num, V)
        law = draft[before, tokens[:, u] if depth else jnp.full(num, V)]
        laws = laws.at[:, u].set(law)
        rest = law
        for v in children:
            if how == "top":
                pick = jnp.argsort(-law, axis=1)[:, shape.ranks[v - 1]]
            else:
                pick = draw(fold_in(key, v), rest)
            tokens = tokens.at[:, v].set(pick.astype(jnp.int32))
            if how == "without":
                rest = rest.at[jnp.arange(num), pick].set(0)
    return shape.tree(tokens) if how == "top" else shape.tree(tokens, probs=laws, drawn=how)


def verdict_of(tree, shape, seed=4):
    return _judge(tree, shape, keys(seed, len(tree.tokens)))


@functools.partial(jax.jit, static_argnums=1)
def _judge(tree, shape, key):
    laws = laws_of(TARGET, tree.tokens, shape)
    return Verdict(tree=tree, chosen=draw(fold_in(key, 7), laws), probs=laws, key=fold_in(key, 8))


def as_it_is(verdict):
    return verdict


def first_two(rule, shape, how, change=as_it_is, num=N):
    """[V, V] counts of the first two tokens that rounds write, and mean accepted drafts."""
    tree = drafted(shape, how, num=num)
    verdict = verdict_of(tree, shape)
    codes, accepted = _walk(rule, verdict, keys(9, len(tree.tokens)), shape.depth, change)
    return np.bincount(np.asarray(codes), minlength=V * V), float(accepted)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _walk(rule, verdict, key, depth, change):
    verdict = change(verdict)
    walk = rule.walk(verdict, depth)
    tokens = jnp.take_along_axis(verdict.tree.tokens, walk.path, axis=1)
    first = jnp.where(walk.num_accepted >= 1, tokens[:, 1], walk.bonus)
    later = draw(key, TARGET[jnp.full(len(first), V), first])
    second = jnp.where(walk.num_accepted == 1, walk.bonus, later)
    if depth > 1:
        second = jnp.where(walk.num_accepted >= 2, tokens[:, -1], second)
    return first * V + second, walk.num_accepted.mean()


@functools.partial(jax.jit, static_argnums=2)
def walk_of(rule, verdict, depth):
    return rule.walk(verdict, depth)


def drawn(verdict, how):
    """A tree that says it was drawn otherwise."""
    return verdict.replace(tree=verdict.tree.replace(drawn=how))


def chi_square(counts):
    p = np.asarray(TARGET, np.float64)
    p /= p.sum(-1, keepdims=True)
    expected = (p[V, V][:, None] * p[V, :V]).reshape(-1) * counts.sum()
    assert expected.min() > 5
    return ((counts - expected) ** 2 / expected).sum()


CHAIN = chain(2)
TREE = from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])
DEPTH_FIRST = TreeShape((0, 1, 1, 0, 4, 0), (0, 0, 1, 1, 0, 2))  # the same, stored otherwise
CASES = [
    (Match(), CHAIN, "top"),
    (Match(), TREE, "without"),
    (SpeculativeSampling(), DEPTH_FIRST, "without"),
    (SpeculativeSampling(), TREE, "with"),
    (BlockVerification(), CHAIN, "without"),
    (TraversalVerification(), DEPTH_FIRST, "without"),
    (TraversalVerification(), TREE, "without"),
    (TraversalVerification(), TREE, "top"),
    (TraversalVerification(), TREE, "with"),
    (TraversalVerification(), CHAIN, "without"),
    (SpeculativeSampling(), CHAIN, "without"),
    (SpeculativeSampling(), TREE, "top"),
    (BlockVerification(), CHAIN, "top"),
    (Match(), CHAIN, "without"),
    (Match(), TREE, "top"),
    (SpeculativeSampling(), CHAIN, "top"),
    (SpeculativeSampling(), TREE, "without"),
    (SpeculativeSampling(), DEPTH_FIRST, "top"),
    (SpeculativeSampling(), CHAIN, "with"),
    (BlockVerification(), chain(1), "without"),
    (BlockVerification(), chain(1), "top"),
]


@pytest.mark.parametrize(
    ("rule", "shape", "how", "num"),
    [*((*case, N) for case in CASES[:6]), *more(*((*case, MANY) for case in CASES))],
)
def test_the_text_follows_the_targets_law(rule, shape, how, num):
    counts, accepted = first_two(rule, shape, how, num=num)
    assert chi_square(counts) < LIMIT and accepted > 0.2


def cut(nodes):
    """Only some nodes are judged: a set in even rows, another one in odd rows."""

    def change(verdict):
        kept = jnp.where(jnp.arange(N)[:, None] % 2 == 0, *(jnp.array([n]) for n in nodes))
        tree, take = verdict.tree.take(kept), jnp.take_along_axis
        return dataclasses.replace(
            verdict, tree=tree, probs=take(verdict.probs, kept[..., None], axis=1),
            chosen=take(verdict.chosen, kept, axis=1),
        )  # fmt: skip

    return change


@pytest.mark.parametrize("how", ["without", *more("top", "with")])
@pytest.mark.parametrize("rule", [SpeculativeSampling(), *more(TraversalVerification())])
def test_a_part_of_the_tree_follows_the_targets_law(rule, how):
    change = cut(([0, 1, 2, 4], [0, 1, 4, 5]))
    counts, accepted = first_two(rule, DEPTH_FIRST, how, change)
    assert chi_square(counts) < LIMIT and accepted > 0.2


# ---- Wrong on purpose: the same test must notice ----------------------------------------------


@struct.dataclass
class BonusFromTarget(SpeculativeSampling):
    """The token behind a rejection is drawn from the target's law, not from what is left of it."""

    def walk(self, verdict, depth):
        walk = SpeculativeSampling.walk(self, verdict, depth)
        node = jnp.take_along_axis(walk.path, walk.num_accepted[:, None], axis=1)
        law = jnp.take_along_axis(verdict.probs, node[..., None], axis=1)[:, 0]
        return walk.replace(bonus=draw(fold_in(verdict.key, 1), law))


@struct.dataclass
class StopsAtTheFirstFailure(BlockVerification):
    """Of two drafts, the second is not looked at if the first alone would not do."""

    def walk(self, verdict, depth):
        p, q, u = verdict.probs, verdict.tree.probs, uniforms(verdict.key, 2)
        rows, (_, x1, x2) = jnp.arange(len(p)), verdict.tree.tokens.T
        p1 = jnp.minimum(1, p[rows, 0, x1] / q[rows, 0, x1])
        surplus = jnp.maximum(p1[:, None] * p[:, 1] - q[:, 1], 0).sum(axis=1)
        p2 = jnp.minimum(1, p1 * p[rows, 1, x2] / q[rows, 1, x2])
        one = u[:, 0] * (surplus + 1 - p1) < surplus
        num = one.astype(jnp.int32) + (one & (u[:, 1] < p2))
        kept = jnp.where(num == 0, 1, p1)[:, None]
        left = _normalise(jnp.maximum(kept * p[rows, num] - q[rows, num], 0), p[rows, num])
        law = jnp.where((num == 2)[:, None], p[:, 2], left)
        path = jnp.minimum(jnp.arange(3)[None], num[:, None])
        return Walk(path, num, draw(fold_in(verdict.key, 1), law))


def sorted_siblings(verdict):
    """Siblings are tested by the draft's probability, not in the order in which they were drawn."""
    tree = verdict.tree
    (first, second, third), rows = (tree.tokens[:, v] for v in (1, 2, 3)), jnp.arange(N)[:, None]
    siblings = jnp.stack([first, second, third], axis=1)
    order = jnp.argsort(-tree.probs[rows, 0, siblings], axis=1)
    tokens = tree.tokens.at[:, 1:4].set(jnp.take_along_axis(siblings, order, axis=1))
    tree = tree.replace(tokens=tokens)
    return dataclasses.replace(verdict, tree=tree, probs=laws_of(TARGET, tokens, FORK))


def other_law(verdict):
    """The ratio uses a law that drafts were not drawn from: that before a temperature, say."""
    laws = Sampling(1.7).probs(jnp.log(verdict.tree.probs))
    return dataclasses.replace(verdict, tree=verdict.tree.replace(probs=laws))


FORK = from_paths([[0], [1], [2]])


@pytest.mark.parametrize(
    ("rule", "shape", "how", "change"),
    [
        (BonusFromTarget(), CHAIN, "without", as_it_is),
        (BonusFromTarget(), TREE, "top", as_it_is),
        (StopsAtTheFirstFailure(), CHAIN, "without", as_it_is),
        (SpeculativeSampling(), FORK, "without", sorted_siblings),
        (SpeculativeSampling(), TREE, "without", lambda v: drawn(v, "with")),
        *more(
            (SpeculativeSampling(), CHAIN, "without", other_law),
            (BlockVerification(), CHAIN, "without", other_law),
            (SpeculativeSampling(), TREE, "with", lambda v: drawn(v, "without")),
            (TraversalVerification(), TREE, "with", lambda v: drawn(v, "without")),
        ),
        (TraversalVerification(), FORK, "without", sorted_siblings),
        (SpeculativeSampling(), DEPTH_FIRST, "without", cut(([0, 4, 5, 6], [0, 1, 4, 6]))),
        (Typical(), TREE, "top", as_it_is),
    ],
    ids=[
        "bonus", "bonus, tree", "first failure", "sorted siblings", "drawn without, tested with",
        "other law", "other law, block", "drawn with, tested without",
        "drawn with, tested without, traversal", "sorted siblings, traversal",
        "a sibling left out", "typical",
    ],
)  # fmt: skip
@pytest.mark.exhaustive(every=4)
def test_wrong_variants_are_noticed(rule, shape, how, change):
    counts, _ = first_two(rule, shape, how, change)
    assert chi_square(counts) > LIMIT


# ---- How much is accepted ---------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_acceptance_length_of_chains_is_the_closed_form():
    """E[tau] = (1 - alpha^(g + 1)) / (1 - alpha), with laws that do not depend on anything."""
    p, q = np.asarray(TARGET[V, V]), np.asarray(DRAFT[V, V])
    alpha, g, num = np.minimum(p, q).sum(), 4, 100_000
    tokens = draw(keys(1, num), jnp.broadcast_to(jnp.asarray(q), (num, g + 1, V)))
    repeat = lambda law: jnp.broadcast_to(jnp.asarray(law), (num, g + 1, V))
    verdict = Verdict(chain(g).tree(tokens, probs=repeat(q)), tokens, repeat(p), keys(2, num))
    accepted = np.asarray(walk_of(SpeculativeSampling(), verdict, g).num_accepted)
    expected = (1 - alpha ** (g + 1)) / (1 - alpha)
    assert abs(1 + accepted.mean() - expected) < 3 * accepted.std() / np.sqrt(num)
    by_block = np.asarray(walk_of(BlockVerification(), verdict, g).num_accepted)
    assert by_block.mean() > accepted.mean() + 3 * accepted.std() / np.sqrt(num)


@pytest.mark.exhaustive(every=4)
def test_a_perfect_draft_is_always_accepted():
    tree = drafted(CHAIN, "without", num=1000)
    laws = laws_of(DRAFT, tree.tokens, CHAIN)
    verdict = Verdict(tree.replace(probs=laws), tree.tokens, laws, keys(5, 1000))
    for rule in (SpeculativeSampling(), BlockVerification()):
        assert (walk_of(rule, verdict, 2).num_accepted == 2).all()


@pytest.mark.exhaustive
def test_siblings_help_and_blocks_accept_more():
    accepted = {
        name: first_two(rule, shape, how)[1]
        for name, rule, shape, how in (
            ("match, top", Match(), TREE, "top"),
            ("match, drawn", Match(), TREE, "without"),
            ("chain", SpeculativeSampling(), CHAIN, "without"),
            ("tree", SpeculativeSampling(), TREE, "without"),
            ("tree, with", SpeculativeSampling(), TREE, "with"),
            ("block", BlockVerification(), CHAIN, "without"),
        )
    }
    assert accepted["chain"] < accepted["block"] < accepted["tree"]
    assert accepted["tree, with"] < accepted["tree"]
    assert accepted["match, drawn"] < accepted["tree"]


def test_one_draft_is_judged_alike_by_blocks_and_tokens():
    """Card: g = 1 is the base rule, for the same random numbers."""
    tree = drafted(chain(1), "without", num=2000)
    verdict = verdict_of(tree, chain(1))
    a, b = (walk_of(rule, verdict, 1) for rule in (SpeculativeSampling(), BlockVerification()))
    np.testing.assert_array_equal(a.num_accepted, b.num_accepted)
    np.testing.assert_array_equal(a.bonus, b.bonus)


@pytest.mark.exhaustive(every=4)
def test_the_order_in_which_nodes_are_stored_changes_nothing():
    """PERMUTE, for walks without randomness."""
    tree = drafted(TREE, "top", num=500)
    order = np.array([0, 3, 1, 5, 4, 2, 6])  # new place -> old node; parents stay before children
    place = np.argsort(order)
    parents = np.asarray(tree.parents)[:, order]
    parents = np.where(parents < 0, -1, place[parents])
    assert (parents < np.arange(7)).all()
    moved = DraftTree(
        tree.tokens[:, order], jnp.asarray(parents), tree.depths[:, order], tree.is_valid[:, order]
    )
    verdict = verdict_of(tree, TREE)
    other = dataclasses.replace(
        verdict, tree=moved, chosen=verdict.chosen[:, order], probs=verdict.probs[:, order]
    )
    for rule in (Match(), Typical()):
        a, b = walk_of(rule, verdict, 2), walk_of(rule, other, 2)
        np.testing.assert_array_equal(a.num_accepted, b.num_accepted)
        np.testing.assert_array_equal(a.path, order[np.asarray(b.path)])


# ---- Medusa's public code ---------------------------------------------------------------------


def medusa_cases():
    golden = json.loads((TRACES / "medusa_tree.json").read_text())
    logits = np.load(TRACES / "medusa_tree_logits.npz")
    for case in golden["cases"]:
        yield golden["choices"][case["choices"]], case, logits[case["logits"]]


@pytest.mark.parametrize("index", range(12))
def test_golden_medusa_trees_and_paths(index):
    choices, case, logits = list(medusa_cases())[index]
    shape = from_paths(choices)
    assert [-1, *shape.parents] == case["parents"] and list(shape.depths) == case["depths"]
    best = [case["root_token"]] + [
        case["head_topk"][depth - 1][rank]
        for depth, rank in zip(shape.depths[1:], shape.ranks, strict=True)
    ]
    assert best == case["tree_tokens"]
    tree = shape.tree(jnp.array([best], jnp.int32))
    for name, result in case["results"].items():
        given = result["arguments"]
        z = jnp.asarray(logits)[None]
        if name == "greedy":
            rule, laws = Match(), None
        else:
            rule = Typical(given["posterior_threshold"], given["posterior_alpha"])
            laws = Sampling(given["temperature"]).probs(z)
        verdict = Verdict(tree, jnp.argmax(z, axis=-1).astype(jnp.int32), laws, keys(0, 1))
        walk = rule.walk(verdict, shape.depth)
        num = int(walk.num_accepted[0])
        got = [best[v] for v in np.asarray(walk.path)[0, 1 : num + 1]]
        assert got == result["accepted"], name


def test_typical_draws_behind_the_path_what_is_typical():
    """By hand: of a flat law little is typical at a high limit, and never nothing."""
    law = jnp.array([[[0.5, 0.3, 0.15, 0.04, 0.01]]])
    tree = chain(0).tree(jnp.zeros((1, 1), jnp.int32))
    entropy = -float((law * jnp.log(law + 1e-5)).sum())
    for epsilon, allowed in ((0.2, {0, 1}), (0.1, {0, 1, 2}), (1.0, {0})):
        rule = Typical(epsilon, 0.6 * np.exp(entropy))
        bonuses = {
            int(walk_of(rule, Verdict(tree, law[..., 0] * 0, law, keys(i, 1)), 0).bonus[0])
            for i in range(60)
        }
        assert bonuses == allowed


def test_walks_end_with_their_last_node():
    walk = Match().walk(
        Verdict(
            chain(3).tree(jnp.array([[9, 1, 2, 3]])), jnp.array([[1, 7, 3, 4]]), None, keys(0, 1)
        ),
        3,
    )
    assert isinstance(walk, Walk)
    assert walk.path.tolist() == [[0, 1, 1, 1]] and walk.num_accepted.tolist() == [1]
    assert walk.bonus.tolist() == [7]
