"""Medusa: heads on the last hidden state draft a tree at once.

Reference: Cai et al., arXiv:2401.10774; see `dlm.heads.medusa`. The token of a node at depth d with
rank r is the r-th best of head d, whatever its parent is, so nothing but the heads has to run.

Letters: B rows, W nodes, D model width, J heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.drafters.contracts import Context, Drafter, Seen
from decode.tree import DraftTree, TreeShape, from_paths
from dlm.config import ModelConfig
from dlm.heads.medusa import head_hidden
from dlm.params import Params
from kernels_pallas.unembed_stats import unembed_stats

# The published tree for Vicuna-7B: 64 nodes with the root.
PUBLISHED = from_paths(
    [
        *([i] for i in range(10)),
        *([i, j] for i, n in enumerate((10, 7, 3, 2, *[1] * 6)) for j in range(n)),
        *([0, i, j] for i, n in enumerate((10, 3, 2, *[1] * 5)) for j in range(n)),
        *([1, 0, 0], [1, 0, 1], [2, 0, 0]),
        *([0, 0, 0, 0], [0, 0, 0, 1]),
    ]
)


@struct.dataclass
class Medusa(Drafter):
    """Drafts of Medusa's heads.

    Attributes:
      own: of `dlm.heads.medusa.load`.
      shape: of the tree, no deeper than there are heads. Static.
    """

    own: Params
    shape: TreeShape = struct.field(pytree_node=False, default=PUBLISHED)

    @property
    def num_nodes(self) -> int:
        return self.shape.num_nodes

    @property
    def depth(self) -> int:
        return self.shape.depth

    @property
    def is_chain(self) -> bool:
        return self.shape.is_chain

    def refuse(self, cfg: ModelConfig) -> str | None:
        return refuse_heads(self.own["unembed"].shape, self.shape, cfg)

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> jax.Array:
        """[B, D]: the hidden state that predicted the root."""
        return jnp.zeros((batch_size, cfg.d_model), cfg.jnp_dtype)

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: jax.Array
    ) -> jax.Array:
        return last_hidden(seen, state)

    def propose(
        self, cfg: ModelConfig, context: Context, state: jax.Array
    ) -> tuple[DraftTree, jax.Array]:
        columns = [context.root]
        best = {}
        for depth in range(1, self.depth + 1):
            ranks = [self.shape.ranks[v - 1] for v in self.shape.level(depth)]
            stats = unembed_stats(
                head_hidden(self.own, state, depth - 1),
                self.own["unembed"][depth - 1],
                k=max(ranks) + 1,
            )
            assert stats.top_tokens is not None
            best[depth] = stats.top_tokens
        for v in range(1, self.num_nodes):
            columns.append(best[self.shape.depths[v]][:, self.shape.ranks[v - 1]])
        return self.shape.tree(jnp.stack(columns, axis=1)), state

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: jax.Array
    ) -> jax.Array:
        return last_hidden(seen, state)


def last_hidden(seen: Seen, before: jax.Array) -> jax.Array:
    """[B, D]: the hidden state of the last position seen; of rows without any, that before."""
    index = jnp.maximum(seen.count - 1, 0)[:, None, None]
    last = jnp.take_along_axis(seen.hidden, index, axis=1)[:, 0]
    return jnp.where((seen.count > 0)[:, None], last, before)


def refuse_heads(unembed: tuple[int, ...], shape: TreeShape, cfg: ModelConfig) -> str | None:
    """Why heads with matrices of shape [J, V, D] cannot draft such a tree for a model, or None."""
    num_heads, vocab_size, d_model = unembed
    if (vocab_size, d_model) != (cfg.vocab_size, cfg.d_model):
        return (
            f"the heads are for a model of vocab_size={vocab_size} and d_model={d_model}, and the "
            f"target has {cfg.vocab_size} and {cfg.d_model}: train heads for it"
        )
    if shape.depth > num_heads:
        return (
            f"the tree has depth {shape.depth}, more than the {num_heads} heads: use a flatter one"
        )
    return None
