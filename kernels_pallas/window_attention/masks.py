"""Who sees whom: packed ancestor bits, ranges, and both spelled out.

Letters: B batch, T window positions, S cache slots, R ranges.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Mask = Literal["full", "causal"] | jax.Array


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
) -> jax.Array:
    """[B, T, S + T] bool: what each query of a [B, T] window attends to, cache slots first."""
    allowed = window_mask(shape, mask, window_range)
    if num_slots == 0 or cache_ranges is None:
        return allowed
    in_cache = in_ranges(cache_ranges, num_slots)[:, None]  # [B, 1, S]
    in_cache = jnp.broadcast_to(in_cache, (*shape, num_slots))
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


def in_ranges(ranges: jax.Array, num_slots: int) -> jax.Array:
    """[B, S] bool: whether a slot is in any of the row's ranges."""
    slot = jnp.arange(num_slots)[None, None]
    return ((slot >= ranges[..., :1]) & (slot < ranges[..., 1:])).any(axis=1)
