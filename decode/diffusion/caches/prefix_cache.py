"""What stands before the open block is cached."""

from __future__ import annotations

from typing import ClassVar

from flax import struct

from decode.diffusion.caches.block_cache import BlockCache, Span
from decode.diffusion.caches.canvas import Canvas


@struct.dataclass
class PrefixCache(BlockCache):
    """Approximate: what stands before the open block is cached; block and suffix are recomputed."""

    short_name: ClassVar[str] = "prefix"

    covers: ClassVar[str] = "suffix"

    def span(self, canvas: Canvas, window_len: int) -> Span:
        longest = canvas.tokens.shape[1] - canvas.prompt_len  # suffix: one whole completion
        return Span(start=canvas.block_start, stop=canvas.end, length=longest)
