"""A dual cache whose windows reach beyond the block, so that what stands near it stays fresh."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from flax import struct

from decode.diffusion.caches.block_cache import BlockCache, Span
from decode.diffusion.caches.canvas import Canvas
from decode.diffusion.contracts import Points, check_range
from dlm.config import ModelConfig


@struct.dataclass
class VicinityCache(BlockCache):
    """Approximate: everything but the open block and its vicinity is cached (vicinity refresh).

    As with `DualCache`, a full forward refreshes the cache when a block opens. Between them every
    forward also recomputes the `before` positions left of the block and the `after` right of it,
    clipped to the row: what stands there sees the tokens that the block gets, and the block sees
    that. It is recomputed from scratch each time; the cache itself changes at refreshes only.

        tokens       pad | prompt .. | decided ... | block .... | masked suffix ....
                           cached  ....... recomp.   recomputed   recomp. .... cached
                                           `before`               `after`

    Without a vicinity this is `DualCache`; with one that holds the whole row it is `NoCache`. With
    shifted logits and before >= 1 the position that predicts the block's first token is recomputed
    too. The public code can also start with some rounds without any cache ("warm-up"); left out.

    Reference: Ma et al., "dInfer: An Efficient Inference Framework for Diffusion Language Models",
    arXiv:2510.08666.

    Attributes:
      before: positions recomputed left of the block, at least 0. Static.
      after: positions recomputed right of it, at least 0. Static.
    """

    short_name: ClassVar[str] = "vicinity"

    covers: ClassVar[str] = "block"

    before: int = struct.field(pytree_node=False, default=16)
    after: int = struct.field(pytree_node=False, default=16)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"vicinity_cache": {"cache": cls(before=block_len, after=block_len)}}

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        check_range("before", self.before, 0, float("inf"))
        check_range("after", self.after, 0, float("inf"))

    def span(self, canvas: Canvas, window_len: int) -> Span:
        return Span(
            start=jnp.maximum(canvas.block_start - self.before, canvas.start),
            stop=jnp.minimum(canvas.block_end + self.after, canvas.end),
            length=min(self.before + window_len + self.after, canvas.tokens.shape[1]),
            before=self.before,
        )
