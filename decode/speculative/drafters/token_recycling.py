"""Every token's likely successors are remembered, and a tree is read off them.

Reference: Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models
with Token Recycling", arXiv:2408.08696. A table holds, per token of the vocabulary, the tokens that
the target last found most probable after it; judging a tree updates it at every node, accepted or
not. The tree has one shape, dense near the root.

Letters: B rows, W nodes, V vocabulary, k successors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Drafter, Proposal, Seen, spent
from decode.speculative.tree import TreeShape, check_shape, from_paths
from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params

# 80 nodes on six levels, as published; which ones the paper only draws.
EIGHTY = from_paths(
    [
        *([i] for i in range(8)),
        *([i, j] for i, n in enumerate((8, 4, 3, 2, 2, 1, 1, 1)) for j in range(n)),
        *([0, i, j] for i, n in enumerate((8, 3, 2, 1, 1, 1)) for j in range(n)),
        *([1, i, j] for i, n in enumerate((2, 1, 1)) for j in range(n)),
        *([2, 0, 0], [2, 1, 0], [3, 0, 0]),
        *([0, 0, i, j] for i, n in enumerate((4, 2, 1, 1)) for j in range(n)),
        *([0, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0]),
        *([0, 0, 0, i, 0] for i in range(3)),
        *([0, 0, 1, 0, 0], [0, 1, 0, 0, 0]),
        *([i, 0, 0] for i in range(4, 8)),
        *([0, 0, 4, 0], [0, 3, 0, 0], [2, 0, 0, 0], [0, 0, 2, 0, 0]),
        *([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]),
    ]
)


@struct.dataclass
class TokenRecycling(Drafter):
    """A tree of one shape of the successors seen so far; nothing is trained.

    Attributes:
      shape: of the tree. Static.
    """

    shape: TreeShape = struct.field(pytree_node=False, default=EIGHTY)

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"token_recycling": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(from_paths([[0], [1], [0, 0], [0, 1], [1, 0]]))

    def validate(self, cfg: ModelConfig) -> None:
        check_shape(self.shape, cfg.vocab_size)

    @property
    def num_best(self) -> int:
        """k: as many as a node has children."""
        return max(self.shape.ranks, default=0) + 1

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> jax.Array:
        """[B, V, k] int32; -1: not known yet."""
        return jnp.full((batch_size, cfg.vocab_size, self.num_best), -1, jnp.int32)

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: jax.Array
    ) -> jax.Array:
        exists = jnp.arange(seen.tokens.shape[1])[None] < seen.count[:, None]
        best = vocab.read(vocab.head(context.params), seen.hidden, k=self.num_best).top_tokens
        assert best is not None
        return _learn(seen.tokens, best, exists, state)

    def propose(self, cfg: ModelConfig, context: Context, state: jax.Array) -> Proposal:
        root = context.root
        rows = jnp.arange(root.shape[0])[:, None]
        tokens = jnp.full((root.shape[0], self.num_nodes), -1, jnp.int32).at[:, 0].set(root)
        for depth in range(1, self.depth + 1):
            nodes = self.shape.level(depth)
            above = jnp.array([self.shape.parents[v - 1] for v in nodes])
            rank = jnp.array([self.shape.ranks[v - 1] for v in nodes])
            of_parent = tokens[:, above]
            found = state[rows, jnp.maximum(of_parent, 0), rank[None]]
            tokens = tokens.at[:, jnp.array(nodes)].set(jnp.where(of_parent >= 0, found, -1))
        return Proposal(self.shape.tree(tokens, tokens >= 0), spent(context, 0), state)

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: jax.Array
    ) -> jax.Array:
        assert seen.tree is not None and seen.best is not None
        return _learn(seen.tree.tokens, seen.best, seen.tree.is_valid, state)


def _learn(tokens: jax.Array, best: jax.Array, exists: jax.Array, table: jax.Array) -> jax.Array:
    """Notes what the target says after each token; of equal tokens, the last one counts."""
    B, T = tokens.shape
    later = jnp.triu(jnp.ones((T, T), bool), 1)[None]
    again = (tokens[:, :, None] == tokens[:, None, :]) & exists[:, None, :] & later
    is_last = exists & ~again.any(axis=2)
    row = jnp.where(is_last, tokens, table.shape[1])
    return table.at[jnp.arange(B)[:, None], row].set(best, mode="drop")
