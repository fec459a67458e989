"""`window_attention` as plain matrix products: runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.slots import Cache
from kernels_pallas.window_attention.masks import Mask, Near, in_ranges, window_mask

_LOWEST = -1e30  # a score no real query-key pair reaches; finite, so differences are never NaN


def attend_xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask = "full",
    window_range: jax.Array | None = None,
    cache: Cache | None = None,
    cache_ranges: jax.Array | None = None,
    layer: jax.Array | int = 0,
    near: Near | None = None,
    *,
    slots_axis: str | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Plain matrix products: heads of a group folded into rows, softmax merged over both parts.

    Bound by the [B, N, T, S + T] float32 scores it stores. Of slots that are split over devices
    every device has its own part, and sums travel: [B, N, T, H + 2] numbers.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    rows = (rows * (H**-0.5 if scale is None else scale)).astype(q.dtype)  # [B, K, G*T, H]

    def scores(keys: jax.Array, allowed: jax.Array) -> jax.Array:  # [B, K, G, T, keys]
        raw = jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32).reshape(
            B, K, N // K, T, -1
        )
        raw = raw if cap is None else cap * jnp.tanh(raw / cap)
        return jnp.where(allowed, raw, _LOWEST)

    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H], like the cache
    in_window = window_mask(q.shape[:2], mask, window_range)
    in_window = in_window if near is None else in_window & near.of_window()
    parts = [(scores(k, in_window[:, None, None]), v)]
    if cache is not None and cache_ranges is not None:
        in_cache = in_ranges(cache_ranges, cache[0].shape[3])[:, None]
        in_cache = in_cache if near is None else in_cache & near.of_cache()
        ck, cv = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
        parts.append((scores(ck, in_cache[:, None, None]), cv))

    top = parts[0][0].max(axis=-1, keepdims=True)
    for part, _ in parts[1:]:
        top = jnp.maximum(top, part.max(axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    if slots_axis is not None:
        top = jax.lax.pmax(top, slots_axis)
    total = jnp.zeros_like(top)
    out = jnp.zeros((B, K, N // K * T, H), jnp.float32)
    for is_cache, (part, values) in enumerate(parts):
        weights = jnp.where(part > _LOWEST, jnp.exp(part - top), 0.0)
        summed = weights.sum(axis=-1, keepdims=True)
        weights = weights.reshape(B, K, N // K * T, -1).astype(values.dtype)
        weighed = jnp.einsum("bkrs,bksh->bkrh", weights, values, preferred_element_type=jnp.float32)
        if is_cache and slots_axis is not None:
            summed, weighed = jax.lax.psum((summed, weighed), slots_axis)
        total, out = total + summed, out + weighed
    out = out / jnp.where(total > 0, total, 1.0).reshape(B, K, -1, 1)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out.astype(q.dtype)
