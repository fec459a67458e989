"""Traversal verification: the card's recursion, its exact law, and how much more it accepts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import draw
from decode.core.streams import Stream, fold_in, uniforms
from decode.speculative.accept import (
    BlockVerification,
    SpeculativeSampling,
    TraversalVerification,
    Verdict,
)
from decode.speculative.tree import DraftTree, chain
from tests.lib.tiers import more


def left_of(w, r, s):
    """What is left of a node's law and weight once a child is rejected."""
    rest = np.maximum(w * r - s, 0)
    total = rest.sum() + 1 - w
    law = rest / rest.sum() if rest.sum() > 0 else r
    return (rest.sum() / total if total > 0 else 0.0), law


def without(s, token):
    rest = np.where(np.arange(len(s)) == token, 0, s)
    return rest / rest.sum() if rest.sum() > 0 else s


def traversal(tree, p, q, drawn, v=0, w=1.0):
    """Nodes in the order in which they are left, with w and the law of the token behind."""
    tokens, children = tree
    r, s = p[v], q[v]
    for c in children[v]:
        y = tokens[c]
        law = s if drawn != "none" else np.eye(len(r))[y]
        yield from traversal(tree, p, q, drawn, c, min(1, w * r[y] / law[y]) if law[y] > 0 else 0.0)
        w, r = left_of(w, r, law)
        if drawn == "without":
            s = without(s, y)
    yield v, (w if v else 1.0), r


def outcomes(tree, p, q, drawn):
    """Every node that may be accepted, with its probability and the law of the token behind."""
    remaining = 1.0
    for v, w, law in traversal(tree, p, q, drawn):
        yield v, remaining * w, law
        remaining *= 1 - w


def node_by_node(tree, p, q, v=0, remaining=1.0):
    """The same of `SpeculativeSampling`, of siblings drawn without replacement."""
    tokens, children = tree
    r, s = p[v], q[v]
    for c in children[v]:
        y = tokens[c]
        accepts = min(1, r[y] / s[y]) if s[y] > 0 else 0.0
        yield from node_by_node(tree, p, q, c, remaining * accepts)
        remaining *= 1 - accepts
        rest = np.maximum(r - s, 0)
        r, s = rest / rest.sum() if rest.sum() > 0 else r, without(s, y)
    yield v, remaining, r


# ---- The rule is the recursion ----------------------------------------------------------------

B, W, V = 600, 8, 4
walk_of = jax.jit(lambda rule, verdict, depth: rule.walk(verdict, depth), static_argnums=(0, 2))


def random_verdict(rng, drawn):
    """Trees of any shape, of which some nodes do not exist; laws with zeros in them."""
    among = lambda b, v: v if b % 2 else min(v, 2)  # or else there are few siblings
    parents = np.array(
        [[-1, *(rng.integers(0, among(b, v)) for v in range(1, W))] for b in range(B)]
    )
    depths, is_valid = np.zeros((B, W), np.int32), rng.random((B, W)) < 0.9
    is_valid[:, 0] = True
    for b, v in itertools.product(range(B), range(1, W)):
        depths[b, v] = depths[b, parents[b, v]] + 1
        is_valid[b, v] &= is_valid[b, parents[b, v]]
    p, q = (rng.dirichlet(np.full(V, 0.6), size=(B, W)).astype(np.float32) for _ in range(2))
    p[:, ::3, 0] = 0
    p /= p.sum(axis=-1, keepdims=True)
    tree = DraftTree(
        tokens=rng.integers(0, V, (B, W), np.int32),
        parents=parents.astype(np.int32),
        depths=depths,
        is_valid=is_valid,
        probs=None if drawn == "none" else q,
        drawn=drawn,
    )
    key = jax.random.key_data(jax.random.split(jax.random.key(5), B))
    return Verdict(tree, tree.tokens, p, key), q


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("drawn", ["without", *more("none", "with")])
def test_walks_are_those_of_the_recursion(drawn):
    verdict, q = random_verdict(np.random.default_rng(0), drawn)
    tree, p = verdict.tree, np.asarray(verdict.probs, np.float64)
    walk = jax.device_get(walk_of(TraversalVerification(), verdict, W - 1))
    u = np.asarray(uniforms(fold_in(verdict.key, Stream.TEST), W))
    laws, ways = [], []
    for b in range(B):
        children = [
            [c for c in range(W) if tree.parents[b, c] == v and tree.is_valid[b, c]]
            for v in range(W)
        ]
        left = traversal((tree.tokens[b], children), p[b], q[b].astype(np.float64), drawn)
        v, law = next((v, law) for v, w, law in left if v == 0 or u[b, v] < w)
        laws.append(law)
        way = [v]
        while way[0]:
            way.insert(0, int(tree.parents[b, way[0]]))
        ways.append(way + [v] * (W - len(way)))
        assert walk.num_accepted[b] == tree.depths[b, v]
    assert walk.path.tolist() == ways
    behind = draw(fold_in(verdict.key, Stream.BONUS), jnp.asarray(np.array(laws), jnp.float32))
    assert walk.bonus.tolist() == behind.tolist()
    assert len(set(walk.num_accepted.tolist())) > 2


@pytest.mark.parametrize("drawn", ["without", *more("none")])
def test_of_a_chain_it_is_block_verification(drawn):
    """For the same random numbers, with chains that end early among them."""
    rng, num = np.random.default_rng(1), 500
    p, q = (rng.dirichlet(np.full(V, 0.8), size=(num, 5)).astype(np.float32) for _ in range(2))
    key = jax.random.key_data(jax.random.split(jax.random.key(2), num))
    tokens = jnp.asarray(rng.integers(0, V, (num, 5), np.int32))
    is_valid = np.arange(5)[None] <= rng.integers(0, 5, (num, 1))
    tree = chain(4).tree(tokens, is_valid, None if drawn == "none" else q)
    verdict = Verdict(tree, tokens, jnp.asarray(p), key)
    a, b = (walk_of(rule, verdict, 4) for rule in (TraversalVerification(), BlockVerification()))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert len(set(np.asarray(a.num_accepted).tolist())) > 3


# ---- Enumeration ------------------------------------------------------------------------------

# Two children of the root, each with a child of its own.
TWO_BY_ONE = [[1, 2], [3], [4], [], []]


def drawn_trees(first, later):
    """All trees that can be drawn without replacement, each with its probability."""
    num = len(first)
    for a, b in itertools.permutations(range(num), 2):
        of_pair = first[a] * first[b] / (1 - first[a])
        for c, d in itertools.product(range(num), repeat=2):
            yield (-1, a, b, c, d), of_pair * later[a, c] * later[b, d]


def tables(rng, num):
    """Laws of the first token, and of the second one given it."""
    return rng.dirichlet(np.full(num, 1.0)), rng.dirichlet(np.full(num, 0.8), size=num)


def enumerated(rng, rule, num=3):
    """The law of the first two tokens less what it should be, and mean accepted drafts."""
    (p1, p2), (q1, q2) = tables(rng, num), tables(rng, num)
    law, accepted = np.zeros((num, num)), 0.0
    last = np.full(num, 1 / num)  # behind the third token: of no interest
    for tokens, chance in drawn_trees(q1, q2):
        _, a, b, c, d = tokens
        p, q = [p1, p2[a], p2[b], last, last], [q1, q2[a], q2[b], last, last]
        for v, probability, behind in rule((tokens, TWO_BY_ONE), p, q):
            depth = (0, 1, 1, 2, 2)[v]
            accepted += chance * probability * depth
            if depth == 0:
                law += chance * probability * behind[:, None] * p2
            elif depth == 1:
                law[tokens[v]] += chance * probability * behind
            else:
                law[(a, c) if v == 3 else (b, d)] += chance * probability
    return np.abs(law - p1[:, None] * p2).max(), accepted


@pytest.mark.parametrize("num_tables", [25, *more(1000)])
def test_the_law_is_exact_and_no_fewer_drafts_are_accepted_than_node_by_node(num_tables):
    gains = []
    for seed in range(num_tables):
        by_rule = [
            enumerated(np.random.default_rng(seed), rule)
            for rule in (functools.partial(outcomes, drawn="without"), node_by_node)
        ]
        assert max(error for error, _ in by_rule) < 1e-12
        gains.append(by_rule[0][1] - by_rule[1][1])
    assert min(gains) > -1e-12 and np.mean(gains) > 0.01


def test_rejections_that_are_forgotten_are_noticed():
    """Wrong on purpose: the law left of the target's, but the draft's as it was."""
    wrong = functools.partial(outcomes, drawn="with")
    errors = [enumerated(np.random.default_rng(seed), wrong)[0] for seed in range(8)]
    assert max(errors) > 1e-3


def test_the_rules_accept_what_enumeration_says():
    """Both, of trees that were drawn: means of many rounds against exact ones."""
    rng, num, count = np.random.default_rng(3), 3, 20_000
    (p1, p2), (q1, q2) = tables(rng, num), tables(rng, num)
    every = [*drawn_trees(q1, q2)]
    chances = np.array([chance for _, chance in every])
    chosen = np.array([tokens for tokens, _ in every])[rng.choice(len(every), count, p=chances)]
    last = np.full((count, num), 1 / num)
    laws = lambda first, later: np.stack(
        [np.tile(first, (count, 1)), later[chosen[:, 1]], later[chosen[:, 2]], last, last], axis=1
    ).astype(np.float32)
    rows = lambda x: jnp.asarray(np.tile(np.array(x, np.int32), (count, 1)))
    tree = DraftTree(
        tokens=jnp.asarray(np.maximum(chosen, 0), jnp.int32), parents=rows([-1, 0, 0, 1, 2]),
        depths=rows([0, 1, 1, 2, 2]), is_valid=rows([1] * 5) > 0,
        probs=jnp.asarray(laws(q1, q2)), drawn="without",
    )  # fmt: skip
    key = jax.random.key_data(jax.random.split(jax.random.key(4), count))
    verdict = Verdict(tree, tree.tokens, jnp.asarray(laws(p1, p2)), key)
    oracles = {
        TraversalVerification: functools.partial(outcomes, drawn="without"),
        SpeculativeSampling: node_by_node,
    }
    means = []
    for rule, oracle in oracles.items():
        _, expected = enumerated(np.random.default_rng(3), oracle)
        accepted = np.asarray(walk_of(rule(), verdict, 2).num_accepted)
        assert abs(accepted.mean() - expected) < 4 * accepted.std() / np.sqrt(count)
        means.append(accepted.mean())
    assert means[0] > means[1]
