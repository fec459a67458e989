"""Tree shapes, ancestors, and the optimal tree against exhaustive search."""

import functools
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from decode.speculative.tree import (
    DraftTree,
    TreeShape,
    chain,
    expected_tokens,
    fastest_tree,
    from_paths,
    optimal_tree,
)
from tests.lib.paths import GOLDEN

TRACES = GOLDEN / "sequoia_tree" / "sequoia_tree.json"


def test_shapes_from_paths():
    shape = from_paths([[1], [0, 0], [0], [0, 1, 0], [0, 1]])
    assert shape.parents == (0, 0, 1, 1, 4) and shape.ranks == (0, 1, 0, 1, 0)
    assert shape.depths == (0, 1, 1, 2, 2, 3) and shape.depth == 3
    assert shape.level(2) == (3, 4) and not shape.is_chain
    assert TreeShape([0, 1], [0, 0]) == chain(2) and hash(chain(2))  # as a file has it
    assert chain(3).is_chain and chain(0).num_nodes == 1 and chain(0).depth == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_paths([[0, 0]]), r"path \[0, 0\] has no parent: add \[0\]"),
        (lambda: from_paths([[0], [0]]), r"path \[0\] must have at least one number and be there"),
        (lambda: TreeShape((0, 2), (0, 0)), "node 2 has parent 2 and rank 0"),
        (lambda: TreeShape((0, 0), (1, 1)), "two children of one node have the same rank"),
        (lambda: TreeShape((0,), ()), "parents has 1 entries and ranks 0"),
        (lambda: optimal_tree([0.9, 0.9], 3, 2), "must be probabilities of exclusive events"),
        (lambda: optimal_tree([0.9], 0, 2), "num_nodes=0 must be at least 1"),
        (lambda: fastest_tree([0.9], {}, 0.1, 2), "must be positive seconds by number of nodes"),
        (lambda: fastest_tree([0.9], {1: 0.0}, 0.1, 2), "must be positive seconds by number"),
        (lambda: fastest_tree([0.9], {0: 1.0}, 0.1, 2), "must be positive seconds by number"),
        (lambda: fastest_tree([0.9], {1: 1.0}, -0.1, 2), "draft_cost=-0.1 and max_depth=2 must"),
    ],
)
def test_bad_shapes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ancestors_by_hand():
    rng = np.random.default_rng(0)
    parents = np.array([[-1, *(rng.integers(0, v) for v in range(1, 9))] for _ in range(20)])
    depths = np.zeros_like(parents)
    expected = np.zeros((20, 9, 9), bool)
    for b, v in itertools.product(range(20), range(9)):
        u = v
        while u >= 0:
            expected[b, v, u] = True
            depths[b, v] += u != v
            u = parents[b, u]
    tree = DraftTree(*(jnp.asarray(x) for x in (parents, parents, depths, parents == parents)))
    np.testing.assert_array_equal(tree.ancestors(int(depths.max())), expected)


def test_of_a_shape_that_was_drawn_levels_are_known():
    """By hand: three levels of two nodes, of which each has its parent by chance."""
    rows = lambda *x: jnp.array([x], jnp.int32)
    tree = DraftTree(
        rows(*range(7)), rows(-1, 0, 0, 2, 2, 3, 4), rows(0, 1, 1, 2, 2, 3, 3),
        jnp.ones((1, 7), bool), drawn="without", is_shape_drawn=True,
    )  # fmt: skip
    assert tree.as_known().parents.tolist() == [[-1, 0, 0, 1, 1, 3, 3]]
    assert tree.replace(is_shape_drawn=False).as_known().parents is tree.parents


def all_shapes(num_nodes, num_ranks, max_depth):
    """Every ancestor-closed set of paths with contiguous ranks, as sets of paths."""

    @functools.cache
    def subtrees(m, depth):
        """All trees of exactly m nodes, as frozensets of paths of the nodes below their root."""
        if m == 1:
            return [frozenset()]
        found = []
        if depth == 0:
            return found
        for sizes in partitions(m - 1, num_ranks):
            parts = [subtrees(size, depth - 1) for size in sizes]
            for choice in itertools.product(*parts):
                paths = set()
                for rank, below in enumerate(choice):
                    paths |= {(rank,), *((rank, *path) for path in below)}
                found.append(frozenset(paths))
        return found

    return subtrees(num_nodes, max_depth)


def partitions(total, most):
    """Ordered sums of at most `most` positive numbers."""
    if total == 0:
        return [()]
    if most == 0:
        return []
    return [(n, *rest) for n in range(1, total + 1) for rest in partitions(total - n, most - 1)]


@pytest.mark.parametrize("rates", [(0.6, 0.2, 0.1), (0.3, 0.25, 0.2), (0.9, 0.05, 0.0)])
@pytest.mark.parametrize("max_depth", [1, 2, 4])
def test_optimal_trees_are_the_best_there_are(rates, max_depth):
    for num_nodes in range(1, 8):
        shape = optimal_tree(rates, num_nodes, max_depth)
        assert shape.num_nodes <= num_nodes and shape.depth <= max_depth
        best = max(
            expected_tokens(from_paths(sorted(paths)), rates)
            for m in range(1, num_nodes + 1)
            for paths in all_shapes(m, len(rates), max_depth)
        )
        assert expected_tokens(shape, rates) == pytest.approx(best)


@pytest.mark.parametrize("case", json.loads(TRACES.read_text())["cases"])
def test_golden_trees_of_sequoia(case):
    """Its levels count the root, and every level is paid for."""
    rates, budgets = case["acceptance"], case["valid_budget"]
    for m, row in zip(budgets, case["expected"], strict=True):
        for level, expected in enumerate(row, start=1):
            if expected is not None:  # of exactly m nodes, and more are never worse
                shape = optimal_tree(rates, m, level - 1)
                assert shape.num_nodes == m and shape.depth <= level - 1
                assert expected_tokens(shape, rates) == pytest.approx(expected, abs=1e-4)
    costs = {
        m: case["draft_time"] + seconds
        for m, seconds in zip(budgets, case["target_time"], strict=True)
    }
    shape, speed = fastest_tree(rates, costs, case["draft_time"], case["max_depth"] - 1)
    assert shape.num_nodes == case["chosen_budget"]
    assert shape.depth == case["chosen_depth"] - 1 == max(case["depths"])
    assert 1 / speed == pytest.approx(case["time_per_token"], rel=1e-5)
    children = lambda parents: sorted(np.bincount(parents, minlength=shape.num_nodes).tolist())
    assert children(shape.parents) == children(case["parents"][1:])


def test_the_fastest_tree_is_the_fastest_of_all():
    """By trying every size and depth; drafts that do not pay are not made."""
    rates = (0.5, 0.2, 0.1)
    costs = {1: 1.0, 2: 1.05, 4: 1.2, 6: 1.3, 16: 4.0}
    for draft_cost in (0.0, 0.1, 0.4, 5.0):
        shape, speed = fastest_tree(rates, costs, draft_cost, 3)
        tried = [
            (expected_tokens(best, rates) / (seconds + best.depth * draft_cost), best)
            for m, seconds in costs.items()
            for depth in range(4)
            for best in [optimal_tree(rates, m, depth)]
        ]
        assert speed == pytest.approx(max(speed for speed, _ in tried))
        assert any(s == pytest.approx(speed) and best == shape for s, best in tried)
    assert shape == chain(0) and speed == 1


def test_expected_tokens_is_what_happens():
    """Drawing which child is accepted, round by round."""
    rates, rng = (0.5, 0.3), np.random.default_rng(1)
    shape = optimal_tree(rates, 12, 4)
    children = {
        (p, r): v for v, (p, r) in enumerate(zip(shape.parents, shape.ranks, strict=True), 1)
    }
    lengths = []
    for _ in range(20_000):
        node, length = 0, 1
        while (node := children.get((node, rng.choice(3, p=(0.5, 0.3, 0.2))))) is not None:
            length += 1
        lengths.append(length)
    error = np.std(lengths) / np.sqrt(len(lengths))
    assert abs(np.mean(lengths) - expected_tokens(shape, rates)) < 4 * error
