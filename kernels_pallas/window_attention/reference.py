"""The contract of `window_attention`, spelled out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.slots import Cache
from kernels_pallas.window_attention.masks import Mask, Near, allowed_positions


def window_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    window_range: jax.Array | None,
    cache: Cache | None = None,
    cache_ranges: jax.Array | None = None,
    layer: jax.Array | int = 0,
    near: Near | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """The contract, spelled out in float32: heads repeated, one dense mask, one softmax.

    Args: as `window_attention`.
    """
    keys, values, num_slots = k, v, 0
    if cache is not None and cache_ranges is not None:
        num_slots = cache[0].shape[3]
        own, of_own = (x[layer][: len(q)].swapaxes(1, 2) for x in cache)
        keys = jnp.concatenate([own, k], axis=1)  # [B, S + T, K, H]
        values = jnp.concatenate([of_own, v], axis=1)
    allowed = allowed_positions(q.shape[:2], num_slots, mask, window_range, cache_ranges, near)
    group = q.shape[2] // k.shape[2]
    keys = jnp.repeat(keys.astype(jnp.float32), group, axis=2)
    values = jnp.repeat(values.astype(jnp.float32), group, axis=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), keys) * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    allowed = allowed[:, None]
    scores = jnp.where(allowed, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.where(allowed, jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, values).astype(q.dtype)
