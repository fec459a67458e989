"""Medusa: heads on the last hidden state draft a tree at once.

Reference: Cai et al., arXiv:2401.10774; see `dlm.heads.medusa`. The token of a node at depth d with
rank r is the r-th best of head d, whatever its parent is, so nothing but the heads has to run.

Letters: B rows, W nodes, D model width, J heads.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Marginals, Proposal, spent
from decode.speculative.drafters.heads import HeadsDrafter
from decode.speculative.tree import from_paths
from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.medusa import MedusaHeads, head_hidden
from dlm.params import Params


@struct.dataclass
class Medusa(HeadsDrafter):
    """A tree of one shape from trained heads, each guessing a place of its own.

    Attributes:
      own: of `dlm.heads.medusa.load`.
    """

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        own = MedusaHeads(num_heads=2).fresh(jax.random.key(0), cfg, params)
        return cls(own, from_paths([[0], [1], [0, 0], [0, 1]]))

    @property
    def num_marginals(self) -> int:
        return self.depth

    def propose(self, cfg: ModelConfig, context: Context, state: jax.Array) -> Proposal:
        columns = [context.root]
        best = {}
        for depth in range(1, self.depth + 1):
            ranks = [self.shape.ranks[v - 1] for v in self.shape.level(depth)]
            best[depth], _ = self._best(state, depth, max(ranks) + 1)
        for v in range(1, self.num_nodes):
            columns.append(best[self.shape.depths[v]][:, self.shape.ranks[v - 1]])
        return Proposal(self.shape.tree(jnp.stack(columns, axis=1)), spent(context, 0), state)

    def marginals(self, cfg: ModelConfig, context: Context, state: jax.Array, k: int) -> Marginals:
        """Of as many heads as the tree is deep."""
        k = min(k, self.own["unembed"].shape[1])
        heads = [self._best(state, depth, k) for depth in range(1, self.depth + 1)]
        tokens, log_probs = (jnp.stack(columns, axis=1) for columns in zip(*heads, strict=True))
        return Marginals(tokens, log_probs, spent(context, 0), state)

    def _best(self, state: jax.Array, depth: int, k: int) -> tuple[jax.Array, jax.Array]:
        """The most probable tokens [B, k] int32 of one head, and log p of each."""
        hidden = head_hidden(self.own, state, depth - 1)
        stats = vocab.read(self.own["unembed"][depth - 1], hidden, k=k)
        assert stats.top_tokens is not None and stats.top_log_probs is not None
        tokens = stats.top_tokens if "ids" not in self.own else self.own["ids"][stats.top_tokens]
        return tokens, stats.top_log_probs
