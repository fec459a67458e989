"""Hydra: heads that see what was drafted above them, level by level.

Reference: Ankner et al., arXiv:2402.05109; see `dlm.heads.hydra`.

Letters: B rows, W nodes, n nodes of a level, D model width, J heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.drafters.contracts import Context
from decode.drafters.expansion import expand
from decode.drafters.heads import HeadsDrafter
from decode.tree import DraftTree
from dlm.config import ModelConfig
from dlm.heads.hydra import head_hidden
from kernels_pallas.unembed_stats import unembed_logits


@struct.dataclass
class Hydra(HeadsDrafter):
    """Drafts of Hydra's heads, `own` of `dlm.heads.hydra.load`.

    Attributes:
      is_sampled: whether siblings are drawn without replacement, for `SpeculativeSampling`; else
        they are the most probable tokens (as published). Static.
    """

    is_sampled: bool = struct.field(pytree_node=False, default=False)

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
