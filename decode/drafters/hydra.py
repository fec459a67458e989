"""Hydra: heads that see what was drafted above them, level by level.

Reference: Ankner et al., arXiv:2402.05109; see `dlm.heads.hydra`.

Letters: B rows, W nodes, n nodes of a level, D model width, J heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.drafters.contracts import Context, Drafter, Seen
from decode.drafters.expansion import expand
from decode.drafters.medusa import PUBLISHED, last_hidden, refuse_heads
from decode.tree import DraftTree, TreeShape
from dlm.config import ModelConfig
from dlm.heads.hydra import head_hidden
from dlm.params import Params
from kernels_pallas.unembed_stats import unembed_logits


@struct.dataclass
class Hydra(Drafter):
    """Drafts of Hydra's heads.

    Attributes:
      own: of `dlm.heads.hydra.load`.
      shape: of the tree, no deeper than there are heads. Static.
      is_sampled: whether siblings are drawn without replacement, for `SpeculativeSampling`; else
        they are the most probable tokens (as published). Static.
    """

    own: Params
    shape: TreeShape = struct.field(pytree_node=False, default=PUBLISHED)
    is_sampled: bool = struct.field(pytree_node=False, default=False)

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
        embed = context.params["embed"]

        def score(tokens: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
            """Logits [B, n, V] of the head of this level, which sees the way to each node."""
            ways = []
            for v in nodes:
                way = [v]
                while way[0]:
                    way.insert(0, self.shape.parents[way[0] - 1])
                ways.append(way)
            depth = len(ways[0]) - 1
            drafted = embed.at[tokens[:, jnp.array(ways)]].get(mode="clip")  # [B, n, d + 1, D]
            hidden = jnp.broadcast_to(state[:, None], (*drafted.shape[:2], state.shape[-1]))
            seen = jnp.concatenate([hidden, drafted.reshape(*drafted.shape[:2], -1)], axis=-1)
            x = head_hidden(self.own, seen, depth)
            flat = unembed_logits(x.reshape(-1, x.shape[-1]), self.own["unembed"][depth])
            return flat.reshape(*x.shape[:2], -1)

        return expand(self.shape, context, score, self.is_sampled), state

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: jax.Array
    ) -> jax.Array:
        return last_hidden(seen, state)
