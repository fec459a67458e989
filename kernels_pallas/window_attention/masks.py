"""Who sees whom: packed ancestor bits, ranges, and both spelled out.

Letters: B batch, T window positions, S cache slots, R ranges.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Mask = Literal["full", "causal"] | jax.Array


class Near(NamedTuple):
    """A limit of sight: queries see only keys less than `reach` positions away.

    Attributes:
      reach: scalar int32, at least 1.
      positions: [B, T] int32. Where the window's queries and keys stand.
      cached: [B, S] int32. Where the keys of the cache's slots stand; None: no slot is read.
    """

    reach: jax.Array
    positions: jax.Array
    cached: jax.Array | None = None

    def of_window(self) -> jax.Array:
        """[B, T, T] bool."""
        return self._sees(self.positions)

    def of_cache(self) -> jax.Array:
        """[B, T, S] bool."""
        assert self.cached is not None
        return self._sees(self.cached)

    def _sees(self, keys: jax.Array) -> jax.Array:
        return jnp.abs(self.positions[:, :, None] - keys[:, None]) < self.reach

    def of_any(self) -> jax.Array:
        """[B, S] bool: slots that some query might see; those left out none sees."""
        assert self.cached is not None
        first, last = (f(self.positions, axis=1, keepdims=True) for f in (jnp.min, jnp.max))
        return (self.cached > first - self.reach) & (self.cached < last + self.reach)


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs bool [..., T] into uint32 [..., ceil(T / 32)]: j is bit j % 32 of word j // 32."""
    short = -mask.shape[-1] % 32
    padded = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, short)])
    bits = padded.reshape(*mask.shape[:-1], -1, 32).astype(jnp.uint32)
    weights = jnp.left_shift(jnp.uint32(1), jnp.arange(32, dtype=jnp.uint32))
    return (bits * weights.reshape((1,) * (bits.ndim - 1) + (32,))).sum(axis=-1, dtype=jnp.uint32)


def allowed_positions(
    shape: tuple[int, ...],
    num_slots: int,
    mask: Mask,
    window_range: jax.Array | None,
    cache_ranges: jax.Array | None,
    near: Near | None = None,
) -> jax.Array:
    """[B, T, S + T] bool: what each query of a [B, T] window attends to, cache slots first."""
    allowed = window_mask(shape, mask, window_range)
    if near is not None:
        allowed = allowed & near.of_window()
    if num_slots == 0 or cache_ranges is None:
        return allowed
    in_cache = jnp.broadcast_to(of_queries(cache_ranges, num_slots), (*shape, num_slots))
    if near is not None:
        in_cache = in_cache & near.of_cache()
    return jnp.concatenate([in_cache, allowed], axis=-1)


def window_mask(shape: tuple[int, ...], mask: Mask, window_range: jax.Array | None) -> jax.Array:
    """[B, T, T] bool: which window positions each query of a [B, T] window may attend to."""
    T = shape[1]
    position = jnp.arange(T)
    if isinstance(mask, str):
        allowed = jnp.ones((1, T, T), bool)
        if mask == "causal":
            allowed = (position[None, :] <= position[:, None])[None]
    else:
        words = mask[:, :, position // 32]  # [B, T, T]
        allowed = (words >> (position % 32).astype(jnp.uint32)[None, None]) & 1 == 1
    if window_range is not None:
        allowed = allowed & in_ranges(window_range[:, None], T)[:, None]
    return jnp.broadcast_to(allowed, (shape[0], T, T))


def of_queries(ranges: jax.Array, num_slots: int) -> jax.Array:
    """[B, T, S] bool, or [B, 1, S]: slots in the ranges [B, T, R, 2] of each query, or of all."""
    found = in_ranges(ranges, num_slots)
    return found if ranges.ndim == 4 else found[:, None]


def in_ranges(ranges: jax.Array, num_slots: int) -> jax.Array:
    """[..., S] bool: whether a slot is in any of R ranges [..., R, 2]."""
    slot = jnp.arange(num_slots).reshape((1,) * (ranges.ndim - 1) + (-1,))
    return ((slot >= ranges[..., :1]) & (slot < ranges[..., 1:])).any(axis=-2)
