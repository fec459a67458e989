"""What a forward runs over, and the cache it reads and writes.

Letters: B batch, T window positions, D model width, R ranges.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from dlm.cache import KVCache, write
from kernels_pallas.window_attention import Mask


class BlockDiffusion(struct.PyTreeNode):
    """Attention of a [noisy ; clean] window, see `kernels_pallas.block_diffusion_attention`.

    Attributes:
      segment_ids: [B, L] int32, for copies of L positions. Positions attend within their segment.
      block_len: positions per block. Static.
      context_len: positions per block of the clean copy; 1: it is causal. None: as many. Static.
    """

    segment_ids: jax.Array
    block_len: int = struct.field(pytree_node=False)
    context_len: int | None = struct.field(pytree_node=False, default=None)


class Window(struct.PyTreeNode):
    """The positions that a forward runs over, and which of them see which.

    Attributes:
      tokens: [B, T] int32.
      positions: [B, T] int32. Rotary positions; row b's first real token is at 0.
      mask: [B, T, ceil(T / 32)] uint32. Ancestor bits as in `window_attention`; or
        `BlockDiffusion`, which goes with neither slots nor a range. None: all of the window, or
        what `is_causal` leaves of it.
      range: [B, 2] int32. First and past-the-last position that is real; None: all are.
      mix: weights [B, T] and vectors [B, T, D] float32: embeddings become (1 - w) x + w v; None:
        they stay.
      is_causal: whether a position sees no later ones; without `mask` only. Static.
    """

    tokens: jax.Array
    positions: jax.Array
    mask: jax.Array | BlockDiffusion | None = None
    range: jax.Array | None = None
    mix: tuple[jax.Array, jax.Array] | None = None
    is_causal: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def at(cls, tokens: jax.Array, start: jax.Array, *, is_causal: bool = False) -> Self:
        """Tokens [B, T] int32 that stand in a row, from position start [B] int32 on."""
        positions = start[:, None] + jnp.arange(tokens.shape[1])[None]
        return cls(tokens, positions, is_causal=is_causal)

    @classmethod
    def left_padded(
        cls,
        tokens: jax.Array,
        start: jax.Array,
        *,
        mask: jax.Array | None = None,
        is_causal: bool = False,
    ) -> Self:
        """Whole texts [B, T] int32, the first real token of each at start [B] int32 of the row."""
        T = tokens.shape[1]
        return cls(
            tokens,
            jnp.maximum(jnp.arange(T)[None] - start[:, None], 0),
            mask=mask,
            range=jnp.stack([start, jnp.full_like(start, T)], axis=1),
            is_causal=is_causal,
        )

    @property
    def attention(self) -> Mask | BlockDiffusion:
        """What attention is told; ValueError if `mask` and `is_causal` are both given."""
        if self.mask is None:
            return "causal" if self.is_causal else "full"
        if self.is_causal:
            raise ValueError("is_causal=True goes without a mask: the mask says who sees whom")
        return self.mask


class Slots(struct.PyTreeNode):
    """A cache and how a forward uses it: what it reads, and where it writes the window.

    Attributes:
      cache: keys and values of other positions. It may have m times as many rows as the window,
        which is then about the first of them, on every device.
      ranges: [B, R, 2] int32. First and past-the-last slots that are attended to; or [B, T, R, 2],
        by each position of the window. None: none.
      write_at: [B] int32. Slot from which on the window's keys and values are written, after
        attention has read the old ones; None: they are not kept.
      write_rows: [B] bool. Rows whose cache is written; None: all.
      length: [B] int32. The most positions that each row's text will have; only models whose rotary
        frequencies depend on it need it.
    """

    cache: KVCache
    ranges: jax.Array | None = None
    write_at: jax.Array | None = None
    write_rows: jax.Array | None = None
    length: jax.Array | None = None

    def store(self, new: KVCache, layers: tuple[int, ...] | None = None) -> KVCache:
        """The cache with what a window leaves in it; as it is if nothing is to be written.

        Args:
          new: [n, B, K, T, H]. The window's keys and values.
          layers: the n layers that are written; None: all.
        """
        if self.write_at is None:
            return self.cache
        return write(self.cache, new, self.write_at, self.write_rows, layers)

    @classmethod
    def below(cls, cache: KVCache, start: jax.Array) -> Self:
        """Reads all slots below start [B] int32; writes nothing."""
        return cls(cache, jnp.stack([jnp.zeros_like(start), start], axis=1)[:, None])

    @classmethod
    def append(cls, cache: KVCache, start: jax.Array, rows: jax.Array | None = None) -> Self:
        """Reads all slots below start [B] int32, and writes the window from there on.

        Args:
          cache: see above.
          start: see above.
          rows: [B] bool. Rows that are written; None: all.
        """
        return cls.below(cache, start).replace(write_at=start, write_rows=rows)
