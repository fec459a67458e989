"""Everything but the open block is cached."""

from __future__ import annotations

from typing import ClassVar

from flax import struct

from decode.diffusion.caches.block_cache import BlockCache, Span
from decode.diffusion.caches.canvas import Canvas


@struct.dataclass
class DualCache(BlockCache):
    """Approximate: everything but the open block is cached, the masked suffix too."""

    short_name: ClassVar[str] = "dual"

    covers: ClassVar[str] = "block"

    def span(self, canvas: Canvas, window_len: int) -> Span:
        return Span(start=canvas.block_start, stop=canvas.block_end, length=window_len)
