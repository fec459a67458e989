"""EAGLE: one decoder layer continues the target's features, and drafts a tree of them.

References: Li et al., EAGLE-1, arXiv:2401.15077 (a tree of one shape, also drawn); EAGLE-2,
arXiv:2406.16858 (the most probable tree); EAGLE-3, arXiv:2503.01840 (another network, either tree).
See `decode.speculative.drafters.feature_network` for what is read when.

Letters: B rows, S slots, W nodes, J depth, E nodes that are expanded, F feature width, D width of
the target, V vocabulary.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Proposal, spent
from decode.speculative.drafters.expansion import BestTree, expand, expand_best
from decode.speculative.drafters.feature_network import FeatureNetwork, FeatureState
from decode.speculative.tree import DraftTree, TreeShape, check_shape, from_paths
from dlm.config import ModelConfig
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.params import Params

# EAGLE-1's published tree: 25 nodes and the root.
PUBLISHED = from_paths(
    [
        *([i] for i in range(4)),
        *([0, i] for i in range(3)),
        *([1, i] for i in range(2)),
        *([2, i] for i in range(2)),
        [3, 0],
        *([0, 0, i] for i in range(3)),
        *([0, 1, i] for i in range(2)),
        *([0, 2, i] for i in range(2)),
        [1, 0, 0],
        *([0, 0, 0, i] for i in range(3)),
        *([0, 0, 0, 0, i] for i in range(2)),
    ]
)


@struct.dataclass
class Eagle(FeatureNetwork):
    """A tree of one shape, one forward per level of a trained layer over the target's features.

    Attributes:
      shape: of the tree, a chain for example. Static.
      is_sampled: whether siblings are drawn without replacement, for `SpeculativeSampling`; else
        they are the most probable tokens. Static.
    """

    shape: TreeShape = struct.field(pytree_node=False, default=PUBLISHED)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = Eagle3Heads()
        own = heads.fresh(jax.random.key(0), cfg, params)
        return cls(heads.network(cfg, own), from_paths([[0], [1], [0, 0], [0, 1], [1, 0]]))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        check_shape(self.shape, self.network.num_ids)

    def propose(self, cfg: ModelConfig, context: Context, state: FeatureState) -> Proposal:
        of_root, cache = self._read_new(context, state)
        states = jnp.zeros((len(of_root), self.num_nodes, of_root.shape[-1]), of_root.dtype)
        states = states.at[:, :1].set(of_root)

        def score(tokens: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
            nonlocal states
            if nodes != (0,):
                known = slice(nodes[-1] + 1)  # nodes behind the last one are above none of them
                tree = jax.tree.map(lambda x: x[:, known], self.shape.tree(tokens))
                read = self._read_nodes(context, tree, states[:, known], cache, self.depth)
                index = jnp.array(nodes)
                states = states.at[:, index].set(read[:, index - 1])
            return self.network.logits(context.params, states[:, jnp.array(nodes)])

        tree = expand(self.shape, context, score, self.is_sampled, self.network.ids)
        return Proposal(tree, spent(context, self.depth), state.replace(cache=cache))


@struct.dataclass
class EagleBest(BestTree, FeatureNetwork):
    """The most probable tree of a trained layer (EAGLE-2), another one in every round.

    Which nodes there are follows from the context alone, so any rule for drafts that were not drawn
    is exact.
    """

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = Eagle1Heads()
        own = heads.fresh(jax.random.key(0), cfg, params)
        return cls(heads.network(cfg, own), width=3, levels=3, budget=9)

    @property
    def num_ids(self) -> int:
        return self.network.num_ids

    def propose(self, cfg: ModelConfig, context: Context, state: FeatureState) -> Proposal:
        states, cache = self._read_new(context, state)

        def score(
            tokens: jax.Array, parents: jax.Array, depths: tuple[int, ...], nodes: tuple[int, ...]
        ) -> jax.Array:
            nonlocal states
            if nodes != (0,):
                rows = jnp.broadcast_to(jnp.array(depths, jnp.int32), tokens.shape)
                tree = DraftTree(tokens, parents, rows, jnp.ones(tokens.shape, bool))
                known = jax.tree.map(lambda x: x[:, : nodes[-1] + 1], tree)
                below = jnp.zeros((len(states), len(nodes), states.shape[-1]), states.dtype)
                every = jnp.concatenate([states, below], axis=1)
                read = self._read_nodes(context, known, every, cache, self.levels)
                states = jnp.concatenate([states, read[:, -len(nodes) :]], axis=1)
            return self.network.logits(context.params, states[:, jnp.array(nodes)])

        tree = expand_best(self.width, self.levels, self.budget, context, score, self.network.ids)
        return Proposal(tree, spent(context, self.levels), state.replace(cache=cache))
