"""OPT-Tree: a draft tree that grows as long as its mass does.

Reference: Wang et al., "OPT-Tree: Speculative Decoding with Adaptive Draft Tree Structure",
arXiv:2406.17276, and the public code. A node's value is the probability of the way to it. Of every
node found so far the n best are kept, and as no node is better than its parent they are a tree;
their values sum to the tokens that it will have accepted if the draft is right about itself,

    S_d = sum of the n best values of levels 1 to d

Another level is drafted while S_d - S_{d-1} > threshold, about what a draft's forward costs of a
target's. So sure texts get deep trees and others flat ones, of equally many nodes.

What is not among the n best can have no descendants there, so the tree of n nodes is all that is
kept and read again. In the public code S lags by one level: the level that was drafted last is in
neither sum nor tree. Here it is in both: the same trees with one forward less, and levels - 1
there is levels here.

Letters: B rows, n nodes below the root, W = n + 1, U draft vocabulary, k children per node, D width
of states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.loop import of_rows
from decode.speculative.contracts import Context, Drafter, Proposal, within
from decode.speculative.drafters.feature_network import FeatureNetwork, FeatureState
from decode.speculative.drafters.smaller_model import DraftState, SmallerModel
from decode.speculative.tree import DraftTree, chain
from dlm.config import ModelConfig
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.params import Params

Score = Callable[[DraftTree, Any], tuple[jax.Array, Any]]


class Growth(struct.PyTreeNode):
    """Trees that grow.

    Attributes:
      tree: the best nodes so far.
      values: [B, W] float32. log of each node's value; the root's: 0; of what does not exist: -inf.
      states: what is known of each node, each [B, W, ...].
      mass: [B] float32. S.
      level: [B] int32. d.
      is_open: [B] bool. Whether another level is drafted.
    """

    tree: DraftTree
    values: jax.Array
    states: Any
    mass: jax.Array
    level: jax.Array
    is_open: jax.Array


def grow(
    context: Context,
    levels: jax.Array | int,
    threshold: jax.Array | float,
    first: jax.Array,
    states: Any,
    score: Score,
    drafted: jax.Array | None = None,
) -> Growth:
    """The best trees of rows that are active.

    Args:
      context: the roots.
      levels: at least 1, the most that are drafted.
      threshold: the least that another level must add to the mass.
      first: [B, 1, U]. Logits of what comes after the root.
      states: each [B, W, ...]. Of the roots, in the first place; n is W - 1.
      score: of a tree and its states: logits [B, W, U] behind all of its nodes, and states, of
        which only those of nodes that have children were known before.
      drafted: [U] int32. The tokens that logits are about; None: all.
    """
    B, W = jax.tree.leaves(states)[0].shape[:2]
    is_root = jnp.broadcast_to(jnp.arange(W)[None] == 0, (B, W))
    tree = DraftTree(
        tokens=jnp.where(is_root, context.root[:, None], 0),
        parents=jnp.where(is_root, -1, 0),
        depths=jnp.where(is_root, 0, 1),
        is_valid=is_root,
    )
    start = Growth(
        tree=tree,
        values=jnp.where(is_root, 0.0, -jnp.inf),
        states=states,
        mass=jnp.zeros(B),
        level=jnp.zeros(B, jnp.int32),
        is_open=context.active,
    )

    def add(growth: Growth, logits: jax.Array) -> Growth:
        """Another level, where there is to be one."""
        added = _add(growth, logits, drafted)
        is_open = (added.mass - growth.mass > threshold) & (added.level < levels)
        return of_rows(growth.is_open, added.replace(is_open=is_open), growth)

    def level(growth: Growth) -> Growth:
        logits, states = score(growth.tree, growth.states)
        return add(growth.replace(states=states), logits)

    grown: Growth = jax.lax.while_loop(lambda g: g.is_open.any(), level, add(start, first))
    return grown


def _add(growth: Growth, logits: jax.Array, drafted: jax.Array | None) -> Growth:
    """With the children of the newest level, of logits [B, m, U] behind the first m nodes."""
    tree, values = growth.tree, growth.values
    (B, W), (_, m, U) = values.shape, logits.shape
    n, k = W - 1, min(W - 1, U)
    best, ids = jax.lax.top_k(jax.nn.log_softmax(logits), k)  # [B, m, k]
    ids = ids if drafted is None else drafted[ids]
    is_newest = tree.is_valid[:, :m] & (tree.depths[:, :m] == growth.level[:, None])
    children = jnp.where(is_newest[..., None], values[:, :m, None] + best, -jnp.inf)
    every = jnp.concatenate([values[:, 1:], children.reshape(B, m * k)], axis=1)
    tokens = jnp.concatenate([tree.tokens[:, 1:], ids.reshape(B, m * k).astype(jnp.int32)], axis=1)
    # Of equals the first, so never a child without its parent.
    kept = jnp.sort(jax.lax.top_k(every, n)[1], axis=1)
    of = lambda x: jnp.take_along_axis(x, kept, axis=1)  # noqa: E731
    is_old, values = kept < n, of(every)
    is_valid = values > -jnp.inf
    old = jnp.where(is_old, 1 + kept, 0)  # where it was in the tree; the new ones were nowhere
    above = jnp.take_along_axis(tree.parents, old, axis=1)
    above = jnp.where(is_old, above, (kept - n) // k)
    place = 1 + jax.vmap(jnp.searchsorted)(kept, above - 1).astype(jnp.int32)
    level = growth.level + 1
    depths = jnp.where(is_old, jnp.take_along_axis(tree.depths, old, axis=1), level[:, None])
    below = lambda x, root: jnp.concatenate([root[:, :1], x], axis=1)  # noqa: E731
    rows, nodes = jnp.arange(B)[:, None], below(old, jnp.zeros_like(old))
    return growth.replace(
        tree=DraftTree(
            tokens=below(of(tokens), tree.tokens),
            parents=below(jnp.where(is_valid & (above > 0), place, 0), tree.parents),
            depths=below(jnp.where(is_valid, depths, 1), tree.depths),
            is_valid=below(is_valid, tree.is_valid),
        ),
        values=below(values, growth.values),
        states=jax.tree.map(lambda x: x[rows, nodes], growth.states),
        mass=jnp.exp(values).sum(axis=1),
        level=level,
    )


@struct.dataclass
class OptTree(Drafter):
    """What drafters of such trees share.

    Attributes:
      budget: >= 1, n, nodes that are judged, the root aside. Static.
      levels: >= 1, the most levels below the root, and forwards of who drafts. Static.
      threshold: >= 0, the mass that a level must have added for another one to be drafted.
    """

    heeds_limits: ClassVar[bool] = True
    budget: int = struct.field(pytree_node=False, default=25)
    levels: int = struct.field(pytree_node=False, default=9)
    threshold: jax.Array | float = 0.5

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        for name, least in (("budget", 1), ("levels", 1), ("threshold", 0)):
            if not float(value := getattr(self, name)) >= least:
                raise ValueError(f"{name}={float(value):g} must be at least {least}")

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def num_nodes(self) -> int:
        return self.budget + 1

    @property
    def depth(self) -> int:
        return min(self.levels, self.budget)


@struct.dataclass
class DraftModelOpt(OptTree, SmallerModel):
    """The most probable tree of a smaller model, as deep as it pays (OPT-Tree)."""

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(params, cfg, budget=6, levels=4, threshold=0.1, layers=(0,))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        self._check_not_sampled()

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        state, forwards = self._catch_up(context, state)
        B, W = len(context.length), self.num_nodes

        def score(tree: DraftTree, states: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._behind(cfg, context, state.cache, tree, tuple(range(W))), states

        root = chain(0).tree(context.root[:, None])
        first = self._behind(cfg, context, state.cache, root, (0,))
        nothing = jnp.zeros((B, W, 0))
        most = within(context, self.depth)
        grown = grow(context, most, self.threshold, first, nothing, score)
        return Proposal(grown.tree, grown.level + forwards, state)


@struct.dataclass
class EagleOpt(OptTree, FeatureNetwork):
    """The most probable tree of a trained layer, as deep as it pays (OPT-Tree)."""

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = Eagle1Heads()
        own = heads.fresh(jax.random.key(0), cfg, params)
        return cls(heads.network(cfg, own), budget=6, levels=4, threshold=0.1)

    def propose(self, cfg: ModelConfig, context: Context, state: FeatureState) -> Proposal:
        of_root, cache = self._read_new(context, state)
        states = jnp.pad(of_root, ((0, 0), (0, self.budget), (0, 0)))

        def score(tree: DraftTree, states: jax.Array) -> tuple[jax.Array, jax.Array]:
            read = self._read_nodes(context, tree, states, cache, self.depth)
            states = jnp.concatenate([states[:, :1], read], axis=1)
            return self.network.logits(context.params, states), states

        first = self.network.logits(context.params, of_root)
        most = within(context, self.depth)
        grown = grow(context, most, self.threshold, first, states, score, self.network.ids)
        return Proposal(grown.tree, grown.level, state.replace(cache=cache))
