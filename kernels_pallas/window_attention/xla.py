"""`window_attention` as plain matrix products: runs anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.slots import Cache
from kernels_pallas.window_attention.masks import Mask, Near, in_ranges, window_mask

SLOTS_AT_ONCE = 512  # of a cache that has more

_LOWEST = -1e30  # a score no real query-key pair reaches; finite, so differences are never NaN

# Of every query, what it has seen so far: the highest score and the sum of weights, each
# [B, K, G, T, 1] float32, and the sum of weighted values [B, K, G*T, H] float32.
_Sums = tuple[jax.Array, jax.Array, jax.Array]


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
    """Plain matrix products: heads of a group folded into rows, softmax merged over all parts.

    Bound by the float32 scores it stores: [B, N, T, S + T], of large caches `SLOTS_AT_ONCE` slots
    at a time, and none of those that nobody sees. Of slots that are split over devices every device
    has its own part, and sums travel: [B, N, T, H + 2] numbers.
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
        return jnp.where(allowed[:, None, None], raw, _LOWEST)

    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H], like the cache
    in_window = window_mask(q.shape[:2], mask, window_range)
    in_window = in_window if near is None else in_window & near.of_window()
    of_window = scores(k, in_window)
    if cache is None or cache_ranges is None:
        top = jax.lax.stop_gradient(of_window.max(axis=-1, keepdims=True))
        _, total, out = _weigh(of_window, v, top)
    elif cache[0].shape[3] > SLOTS_AT_ONCE and slots_axis is None:
        top = jax.lax.stop_gradient(of_window.max(axis=-1, keepdims=True))
        sums = _weigh(of_window, v, top)
        _, total, out = _in_parts(sums, scores, cache, cache_ranges, layer, near)
    else:
        in_cache = in_ranges(cache_ranges, cache[0].shape[3])[:, None]
        in_cache = in_cache if near is None else in_cache & near.of_cache()
        ck, cv = (jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
        of_cache = scores(ck, in_cache)
        top = functools.reduce(
            jnp.maximum, (x.max(axis=-1, keepdims=True) for x in (of_window, of_cache))
        )
        top = jax.lax.stop_gradient(top)
        if slots_axis is not None:
            top = jax.lax.pmax(top, slots_axis)
        _, total, out = _weigh(of_window, v, top)
        _, summed, weighed = _weigh(of_cache, cv, top)
        if slots_axis is not None:
            summed, weighed = jax.lax.psum((summed, weighed), slots_axis)
        total, out = total + summed, out + weighed
    out = out / jnp.where(total > 0, total, 1.0).reshape(B, K, -1, 1)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out.astype(q.dtype)


def _weigh(scores: jax.Array, values: jax.Array, top: jax.Array) -> _Sums:
    """Sums over keys with scores [B, K, G, T, keys] and values [B, K, keys, H]; `top` is above."""
    B, K, G, T, _ = scores.shape
    weights = jnp.where(scores > _LOWEST, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.reshape(B, K, G * T, -1).astype(values.dtype)
    out = jnp.einsum("bkrs,bksh->bkrh", weights, values, preferred_element_type=jnp.float32)
    return top, total, out


def _in_parts(
    sums: _Sums,
    scores: Callable[[jax.Array, jax.Array], jax.Array],
    cache: Cache,
    ranges: jax.Array,
    layer: jax.Array | int,
    near: Near | None,
) -> _Sums:
    """Adds what a cache holds to sums, `SLOTS_AT_ONCE` slots at a time; slots outside of all
    ranges are not read.

    A part that is outside of a row's ranges changes nothing of the row, whoever else reads it.
    """
    _, B, K, S, H = cache[0].shape
    n = SLOTS_AT_ONCE

    def add(sums: _Sums, first: jax.Array) -> _Sums:
        start = jnp.minimum(first, S - n)  # the last part is whole, and skips what was seen
        slot = start + jnp.arange(n)
        allowed = (in_ranges(ranges - start, n) & (slot >= first)[None])[:, None]
        if near is not None:
            assert near.cached is not None
            cached = jax.lax.dynamic_slice_in_dim(near.cached, start, n, axis=1)
            allowed = allowed & near._replace(cached=cached).of_cache()
        ck, cv = (jax.lax.dynamic_slice(c, (layer, 0, 0, start, 0), (1, B, K, n, H)) for c in cache)
        part = scores(ck[0], allowed)
        top, total, out = sums
        higher = jnp.maximum(top, jax.lax.stop_gradient(part.max(axis=-1, keepdims=True)))
        _, summed, weighed = _weigh(part, cv[0], higher)
        factor = jnp.exp(top - higher)
        of_rows = factor.reshape(*out.shape[:-1], 1)
        return higher, total * factor + summed, out * of_rows + weighed

    def read(sums: _Sums, first: jax.Array) -> tuple[_Sums, None]:
        low, high = jnp.maximum(ranges[..., 0], first), jnp.minimum(ranges[..., 1], first + n)
        return jax.lax.cond((low < high).any(), add, lambda sums, first: sums, sums, first), None

    return jax.lax.scan(read, sums, jnp.arange(0, S, n))[0]
