"""Trees that models grow, against brute force on a table of laws."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters import expansion
from decode.speculative.tree import chain, from_paths
from tests.lib.jitted import as_one_program
from tests.lib.paths import GOLDEN
from tests.lib.tiers import more

expand, expand_best = as_one_program(expansion.expand), as_one_program(expansion.expand_best)

TRACES = GOLDEN / "eagle2_tree"
V, B = 7, 30
LOGITS = jnp.asarray(np.random.default_rng(0).normal(0, 1.5, (V, V)), jnp.float32)
LOG_P = np.asarray(jax.nn.log_softmax(LOGITS))


def context(temperature=None, num=B):
    roots = jnp.arange(num, dtype=jnp.int32) % V
    return Context(
        params={}, tokens=roots[:, None], length=jnp.ones(num, jnp.int32),
        key=jax.random.key_data(jax.random.split(jax.random.key(1), num)),
        sampling=Sampling(temperature=temperature), active=jnp.ones(num, bool), cache=None,
    )  # fmt: skip


def ways(tree, b):
    """The tokens from the root to each node."""
    tokens, parents = np.asarray(tree.tokens[b]), np.asarray(tree.parents[b])
    found = [(tokens[0],)]
    for v in range(1, len(tokens)):
        assert 0 <= parents[v] < v
        found.append((*found[parents[v]], tokens[v]))
        assert int(tree.depths[b, v]) == len(found[v]) - 1
    return [tuple(int(t) for t in way) for way in found]


def value(way):
    return sum(LOG_P[a, b] for a, b in itertools.pairwise(way))


@pytest.mark.parametrize(
    ("width", "levels", "budget"), [(3, 3, 8), (2, 4, 14), *more((1, 4, 3), (7, 1, 7))]
)
def test_the_best_nodes_are_kept(width, levels, budget):
    score = lambda tokens, parents, depths, nodes: LOGITS[tokens[:, jnp.array(nodes)]]
    tree = expand_best(width, levels, budget, context(), score)
    for b in range(B):
        root = b % V
        frontier, seen = [(root,)], []
        for _ in range(levels):
            level = [
                (*way, int(t)) for way in frontier for t in np.argsort(-LOG_P[way[-1]])[:width]
            ]
            seen += level
            frontier = sorted(level, key=value, reverse=True)[:width]
        best = sorted(seen, key=value, reverse=True)[:budget]
        got = ways(tree, b)
        assert got[0] == (root,) and sorted(got[1:]) == sorted(best)
        assert {way[:-1] for way in got[1:]} <= set(got)  # parents are there too


@pytest.mark.parametrize("case", json.loads((TRACES / "eagle2_tree.json").read_text())["cases"])
def test_golden_trees_of_eagle_2(case):
    """Its `depth` levels come below a first one."""
    table = jnp.asarray(np.load(TRACES / "eagle2_tree.npz")[case["table"]])
    score = lambda tokens, parents, depths, nodes: table[tokens[:, jnp.array(nodes)]]
    one = dataclasses.replace(context(num=1), tokens=jnp.array([[case["root"]]], jnp.int32))
    levels, budget = case["depth_argument"] + 1, case["nodes_without_root"]
    tree = expand_best(case["top_k"], levels, budget, one, score)
    expected = [(case["root"],)]
    for token, parent in zip(case["tokens"][1:], case["parents"][1:], strict=True):
        expected.append((*expected[parent], token))
    assert sorted(ways(tree, 0)) == sorted(expected) and levels == case["levels"]


def test_of_one_child_each_it_is_a_chain():
    score = lambda tokens, parents, depths, nodes: LOGITS[tokens[:, jnp.array(nodes)]]
    tree = expand_best(1, 5, 4, context(), score)
    assert (np.asarray(tree.parents) == np.arange(-1, 4)).all()


SHAPE = from_paths([[0], [1], [2], [0, 0], [0, 1], [2, 0], [0, 0, 0]])


def test_a_given_shape_takes_the_most_probable_children():
    score = lambda tokens, nodes: LOGITS[tokens[:, jnp.array(nodes)]]
    tree = expand(SHAPE, context(), score, is_sampled=True)  # greedy texts draw nothing
    assert tree.probs is None
    for b in range(B):
        got = ways(tree, b)
        for v in range(1, SHAPE.num_nodes):
            order = np.argsort(-LOG_P[got[v][-2]])
            assert got[v][-1] == order[SHAPE.ranks[v - 1]]


def test_siblings_are_drawn_without_replacement_in_order():
    """The pair of the first two children, against q(y1) q(y2) / (1 - q(y1))."""
    num = 70_000
    score = lambda tokens, nodes: LOGITS[tokens[:, jnp.array(nodes)]]
    run = jax.jit(lambda c: expand(SHAPE, c, score, is_sampled=True))
    tree = run(context(0.8, num))
    q = np.asarray(Sampling(0.8).probs(LOGITS), np.float64)
    tokens = np.asarray(tree.tokens)
    np.testing.assert_allclose(tree.probs[:50, 0], q[tokens[:50, 0]], atol=1e-6)
    np.testing.assert_allclose(tree.probs[:50, 1], q[tokens[:50, 1]], atol=1e-6)
    rows = tokens[tokens[:, 0] == 3]
    counts = np.bincount(rows[:, 1] * V + rows[:, 2], minlength=V * V)
    law = q[3] / q[3].sum()
    expected = law[:, None] * law[None] / (1 - law[:, None]) * (1 - np.eye(V))
    expected = expected.reshape(-1) * len(rows)
    assert counts[expected == 0].sum() == 0
    large = expected > 5
    assert ((counts - expected)[large] ** 2 / expected[large]).sum() < 90  # up to 41 degrees


def test_chains_are_trees_too():
    score = lambda tokens, nodes: LOGITS[tokens[:, jnp.array(nodes)]]
    tree = expand(chain(3), context(), score, is_sampled=False)
    way = [5]
    for _ in range(3):
        way.append(int(LOG_P[way[-1]].argmax()))
    assert ways(tree, 5)[3] == tuple(way)
