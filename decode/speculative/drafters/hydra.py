"""Hydra: heads that see what was drafted above them, level by level.

Reference: Ankner et al., arXiv:2402.05109; see `dlm.heads.hydra`.

Letters: B rows, W nodes, n nodes of a level, D model width, J heads, U draft vocabulary.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Proposal, Seen, spent
from decode.speculative.drafters.expansion import expand
from decode.speculative.drafters.heads import HeadsDrafter
from decode.speculative.tree import from_paths
from dlm import vocab
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.heads.hydra import HydraHeads, head_hidden, prefix_config, read_prefix
from dlm.params import Params
from dlm.window import Slots, Window


class HydraState(struct.PyTreeNode):
    """What is known of the text.

    Attributes:
      hidden: [B, D]. c of the position before the root.
      cache: of Hydra++'s layer, a slot per position; None without it.
    """

    hidden: jax.Array
    cache: KVCache | None


@struct.dataclass
class Hydra(HeadsDrafter):
    """A tree of one shape from trained heads, each seeing the drafts before it (Hydra, Hydra++).

    Attributes:
      own: of `dlm.heads.hydra.load`.
      is_sampled: whether siblings are drawn without replacement, for `SpeculativeSampling`; else
        they are the most probable tokens (as published). Static.
    """

    is_sampled: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        own = HydraHeads(num_heads=2, has_prefix=True).fresh(jax.random.key(0), cfg, params)
        return cls(own, from_paths([[0], [1], [0, 0], [0, 1]]))

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> HydraState:
        cache = None
        if "prefix" in self.own:
            cache = init_cache(prefix_config(cfg), batch_size, num_slots)
        return HydraState(super().init(cfg, batch_size, num_slots), cache)

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: HydraState
    ) -> HydraState:
        """c of the last position seen; what is behind `seen.count` is overwritten later."""
        window = Window.at(seen.tokens, seen.start, is_causal=True)
        slots = None if state.cache is None else Slots.append(state.cache, seen.start)
        c, cache = read_prefix(self.own, cfg, seen.hidden, window, slots)
        last = super().observe(cfg, context, seen.replace(hidden=c), state.hidden)
        return HydraState(last, cache)

    def propose(self, cfg: ModelConfig, context: Context, state: HydraState) -> Proposal:
        embed, c = context.params["embed"], state.hidden

        def score(tokens: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
            """Logits [B, n, U] of the head of this level, which sees the way to each node."""
            ways = []
            for v in nodes:
                way = [v]
                while way[0]:
                    way.insert(0, self.shape.parents[way[0] - 1])
                ways.append(way)
            depth = len(ways[0]) - 1
            drafted = embed.at[tokens[:, jnp.array(ways)]].get(mode="clip")  # [B, n, d + 1, D]
            hidden = jnp.broadcast_to(c[:, None], (*drafted.shape[:2], c.shape[-1]))
            inputs = jnp.concatenate([hidden, drafted.reshape(*drafted.shape[:2], -1)], axis=-1)
            x = head_hidden(self.own, inputs, depth)
            return vocab.logits(self.own["unembed"][depth], x)

        return Proposal(
            expand(self.shape, context, score, self.is_sampled, self.own.get("ids")),
            spent(context, 0),
            state,
        )
