"""Draft trees: what may come next, as nodes under the last committed token.

Node 0 is the root, that token itself; every other node is a guess about the token after its
parent's. A chain is a tree with one child per node. Parents come before their children; siblings
are tested in the order in which they are stored.

Letters: B rows, W nodes, J largest depth, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.requests import whole_number

Drawn = Literal["none", "with", "without"]


class DraftTree(struct.PyTreeNode):
    """Guesses of all rows.

    Attributes:
      tokens: [B, W] int32.
      parents: [B, W] int32. Index of the parent, below the node's own; of the root: -1.
      depths: [B, W] int32. Of the root: 0.
      is_valid: [B, W] bool. Nodes that exist; their parents do too, and the root always.
      probs: [B, W, V] float32. Row v is the distribution that the children of node v were drawn
        from; None if they were not drawn.
      drawn: how the children of a node were found: "none": they follow from what is known; "with":
        drawn independently of each other; "without": drawn without replacement, in this order. Of
        a single child the latter two are the same. Static.
      is_shape_drawn: whether the parents follow from what was drawn. Then nodes are stored level by
        level, as many in each round, and any number of the first ones may be judged alone. Static.
    """

    tokens: jax.Array
    parents: jax.Array
    depths: jax.Array
    is_valid: jax.Array
    probs: jax.Array | None = None
    drawn: Drawn = struct.field(pytree_node=False, default="none")
    is_shape_drawn: bool = struct.field(pytree_node=False, default=False)

    def as_known(self) -> DraftTree:
        """The tree as far as its shape was known before it was drawn.

        If that was drawn, all nodes of a level stand behind the first one of the level above.
        """
        if not self.is_shape_drawn:
            return self
        above = self.depths[:, None] == self.depths[..., None] - 1  # [B, v, u]
        first = jnp.where(above.any(axis=2), jnp.argmax(above, axis=2), -1)
        return self.replace(parents=first.astype(jnp.int32))

    def ancestors(self, depth: int) -> jax.Array:
        """[B, W, W] bool: [b, v, u] is whether u is v or above it. `depth` is at least J."""
        W = self.tokens.shape[1]
        found = jnp.broadcast_to(jnp.eye(W, dtype=bool)[None], (*self.tokens.shape, W))
        above = self.parents
        for _ in range(depth):
            found = found | (above[..., None] == jnp.arange(W)[None, None])
            above = jnp.where(above > 0, jnp.take_along_axis(self.parents, above, axis=1), -1)
        return found

    @property
    def counts(self) -> jax.Array:
        """[B, W] bool: nodes that exist, as far as that was known before they were drawn."""
        return self.is_valid if self.drawn == "none" else jnp.ones_like(self.is_valid)

    def ranks(self) -> jax.Array:
        """[B, W] int32: how many siblings of a node are tested before it."""
        W = self.tokens.shape[1]
        is_before = jnp.arange(W)[None, :, None] > jnp.arange(W)[None, None]  # [1, v, u]
        is_sibling = self.parents[:, :, None] == self.parents[:, None]
        return (is_before & is_sibling & self.counts[:, None]).sum(axis=2, dtype=jnp.int32)

    def take(self, nodes: jax.Array) -> DraftTree:
        """The tree of some nodes [B, n] int32, which rise; of each, its parent and the siblings
        that are tested before it must be among them."""
        of = lambda x: jnp.take_along_axis(x, nodes, axis=1)  # noqa: E731
        is_parent = of(self.parents)[:, :, None] == nodes[:, None]  # [B, n, n]
        found = jnp.argmax(is_parent, axis=2).astype(jnp.int32)
        probs = self.probs
        return self.replace(
            tokens=of(self.tokens),
            parents=jnp.where(is_parent.any(axis=2), found, -1),
            depths=of(self.depths),
            is_valid=of(self.is_valid),
            probs=None if probs is None else jnp.take_along_axis(probs, nodes[..., None], axis=1),
        )


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """A tree whose shape is the same in every round. Hashable, so static under `jax.jit`.

    Attributes:
      parents: of nodes 1 to W - 1; parents first.
      ranks: of nodes 1 to W - 1: the node is its parent's rank-th best child, from 0.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("parents", "ranks"):  # a file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.parents) != len(self.ranks):
            raise ValueError(
                f"parents has {len(self.parents)} entries and ranks {len(self.ranks)}: they must "
                "be as many"
            )
        for v, (parent, rank) in enumerate(zip(self.parents, self.ranks, strict=True), start=1):
            if not 0 <= parent < v or rank < 0:
                raise ValueError(
                    f"node {v} has parent {parent} and rank {rank}: the parent must come before "
                    "it, and the rank be at least 0"
                )
        if len(set(zip(self.parents, self.ranks, strict=True))) < len(self.parents):
            raise ValueError("two children of one node have the same rank: each must be another")

    @property
    def num_nodes(self) -> int:
        """W, with the root."""
        return len(self.parents) + 1

    @functools.cached_property
    def depths(self) -> tuple[int, ...]:
        """Of all nodes, the root's 0 first."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """J."""
        return max(self.depths)

    @property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(len(self.parents)))

    def level(self, depth: int) -> tuple[int, ...]:
        """The nodes of one depth."""
        return tuple(v for v, d in enumerate(self.depths) if d == depth)

    def tree(
        self,
        tokens: jax.Array,
        is_valid: jax.Array | None = None,
        probs: jax.Array | None = None,
        drawn: Drawn = "without",
    ) -> DraftTree:
        """The same shape in every row, with `tokens` [B, W], the root's first.

        `probs` [B, W, V] are those that children were drawn from, as `drawn` says.
        """
        rows = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), tokens.shape)  # noqa: E731
        return DraftTree(
            tokens=tokens,
            parents=rows((-1, *self.parents)),
            depths=rows(self.depths),
            is_valid=jnp.ones(tokens.shape, bool) if is_valid is None else is_valid,
            probs=probs,
            drawn="none" if probs is None else drawn,
        )


def chain(num_drafts: int) -> TreeShape:
    """One guess after the other; 0: only the root, which is plain decoding."""
    return TreeShape(tuple(range(num_drafts)), (0,) * num_drafts)


def check_shape(shape: Any, num_ids: int) -> None:
    """ValueError if it is none, or a node has more children than there are tokens to draft."""
    if not isinstance(shape, TreeShape):
        raise ValueError(
            f"shape={shape!r} must be a TreeShape, such as branching(3, 2), chain(4) or "
            "from_paths([[0], [1], [0, 0]]) of decode.speculative.tree"
        )
    most = max(shape.ranks, default=-1) + 1
    if most > num_ids:
        raise ValueError(
            f"shape has nodes with {most} children, and there are {num_ids} different tokens to "
            "draft: use a narrower tree"
        )


def branching(*counts: int) -> TreeShape:
    """Every node of a level has as many children: the root the first of `counts`, and so on.

    Raises:
      ValueError: a count is no whole number, or below 1.
    """
    if any(whole_number("a number of children", count) < 1 for count in counts):
        raise ValueError(f"counts={counts} must be at least 1 each")
    paths: list[tuple[int, ...]] = []
    level: list[tuple[int, ...]] = [()]
    for count in counts:
        level = [(*path, rank) for path in level for rank in range(count)]
        paths += level
    return from_paths(paths)


def from_paths(paths: Sequence[Sequence[int]]) -> TreeShape:
    """A tree from its paths, as Medusa's choices are written.

    Example:
      >>> from_paths([[0], [1], [0, 0]]).parents
      (0, 0, 1)

    Args:
      paths: [a, b, c] is the c-th best child of the b-th best child of the a-th best child of the
        root. Every beginning of a path must be a path too. Nodes are stored by length, then in
        the order of their numbers.

    Raises:
      ValueError: a path's beginning is missing, or a path is there twice.
    """
    ordered = sorted(map(tuple, paths), key=lambda path: (len(path), path))
    index: dict[tuple[int, ...], int] = {(): 0}
    parents = []
    for path in ordered:
        if not path or path in index:
            raise ValueError(f"path {list(path)} must have at least one number and be there once")
        if path[:-1] not in index:
            raise ValueError(f"path {list(path)} has no parent: add {list(path[:-1])}")
        parents.append(index[path[:-1]])
        index[path] = len(index)
    return TreeShape(tuple(parents), tuple(path[-1] for path in ordered))


def optimal_tree(rates: Sequence[float], num_nodes: int, max_depth: int) -> TreeShape:
    """The static tree that commits most tokens per round, by dynamic programming.

    Reference: Chen et al., "Sequoia: Scalable, Robust, and Hardware-aware Speculative Decoding",
    arXiv:2402.12374, Sec. 4.1. With T(m, l, b) the expected tokens of a subtree of m nodes and
    depth at most l whose root has exactly b children:

        T(1, l, 0) = 1
        T(m, l, b) = max over y of T(y, l, b - 1) + rates[b] max over b' of T(m - y, l - 1, b')

    Args:
      rates: probability that a node's b-th child, in the order they are tested, is the one that
        is accepted; such as was measured.
      num_nodes: W, with the root.
      max_depth: J.

    Raises:
      ValueError: rates that are no probabilities, or no node.
    """
    plan = _Plan(rates)
    if num_nodes < 1 or max_depth < 0:
        raise ValueError(f"num_nodes={num_nodes} must be at least 1 and max_depth={max_depth} 0")
    return plan.tree(plan.size(num_nodes, max_depth), max_depth)


def fastest_tree(
    rates: Sequence[float], costs: Mapping[int, float], draft_cost: float, max_depth: int
) -> tuple[TreeShape, float]:
    """The static tree that commits most tokens per second.

    Reference: as `optimal_tree`, Sec. 4.3: the smallest (l draft_cost + costs[m]) / T(m, l) over
    the sizes m whose cost is known and depths l.

    Args:
      rates: as of `optimal_tree`.
      costs: by number of nodes, with the root: seconds of a round of the target that judges so
        many, or fewer; such as was measured.
      draft_cost: seconds that drafting one level takes.
      max_depth: J.

    Returns:
      The tree, and its tokens per second.

    Raises:
      ValueError: rates that are no probabilities, or costs that are not positive.
    """
    plan = _Plan(rates)
    if not costs or min(costs) < 1 or not all(0 < x < math.inf for x in costs.values()):
        raise ValueError(f"costs={dict(costs)} must be positive seconds by number of nodes")
    if not 0 <= draft_cost < math.inf or max_depth < 0:
        raise ValueError(f"draft_cost={draft_cost} and max_depth={max_depth} must be at least 0")
    speed, m, depth = max(
        (plan.best(m, depth)[0] / (seconds + depth * draft_cost), -m, -depth)
        for most, seconds in costs.items()
        for depth in range(min(most - 1, max_depth) + 1)
        if (m := plan.size(most, depth))
    )
    return plan.tree(-m, -depth), speed


class _Plan:
    """Expected tokens of the best trees of every size and depth; see `optimal_tree`."""

    def __init__(self, rates: Sequence[float]) -> None:
        if not rates or any(not 0 <= rate <= 1 for rate in rates) or sum(rates) > 1 + 1e-6:
            raise ValueError(f"rates={list(rates)} must be probabilities of exclusive events")
        self.rates = rates
        self.best = functools.cache(self._best)
        self.exactly = functools.cache(self._exactly)

    def _best(self, m: int, depth: int) -> tuple[float, int]:
        """Tokens of m nodes over all numbers of children, and that number; -inf: impossible."""
        options = [(self.exactly(m, depth, b)[0], -b) for b in range(min(m, len(self.rates) + 1))]
        tokens, b = max(options)
        return tokens, -b

    def _exactly(self, m: int, depth: int, b: int) -> tuple[float, int]:
        """Tokens with b children, and the nodes that are left beside the last child's subtree."""
        if b == 0:
            return (1.0, 0) if m == 1 else (-math.inf, 0)
        if m < b + 1 or depth == 0:
            return -math.inf, 0
        options = []
        for y in range(b, m):
            last, others = self.best(m - y, depth - 1)[0], self.exactly(y, depth, b - 1)[0]
            options.append((others + self.rates[b - 1] * last if last > 0 else last, -y))
        tokens, y = max(options)
        return tokens, -y

    def size(self, most: int, depth: int) -> int:
        """Of at most so many nodes the number that is worth most."""
        return max(range(1, most + 1), key=lambda m: self.best(m, depth)[0])

    def tree(self, m: int, depth: int) -> TreeShape:
        """The best one of exactly m nodes."""
        paths: list[tuple[int, ...]] = []

        def collect(path: tuple[int, ...], m: int, depth: int) -> None:
            if path:
                paths.append(path)
            b = self.best(m, depth)[1]
            while b > 0:
                y = self.exactly(m, depth, b)[1]
                collect((*path, b - 1), m - y, depth - 1)
                m, b = y, b - 1

        collect((), m, depth)
        return from_paths(paths)


def expected_tokens(shape: TreeShape, rates: Sequence[float]) -> float:
    """Tokens that a round commits on average, the one behind the drafts included."""
    reached = np.ones(shape.num_nodes)
    for v, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True), start=1):
        reached[v] = reached[parent] * (rates[rank] if rank < len(rates) else 0.0)
    return float(reached.sum())
