"""`window_attention` as plain matrix products: runs anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas.slots import Cache, Layers, at_layer
from kernels_pallas.window_attention.masks import Mask, Near, of_queries, window_mask

SLOTS_AT_ONCE = 512  # of a cache that has more
MANY_SLOTS = 512  # of all rows, from which on keys are multiplied slot by slot,
FEW_QUERIES = 24  # unless each key meets more queries than these
# Scores of a row that are stored to read all slots of a layer where they lie.
SCORES_AT_ONCE, SLOTS_IN_PLACE = 2**20, 4096

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
    cache: Cache | tuple[Layers, Layers] | None = None,
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
    at a time, and none of those that nobody sees. Short windows read a cache that lies apart at
    once: on a CPU a copy of a part costs more than slots that nobody sees. Of slots that are split
    over devices every device has its own part, and sums travel: [B, N, T, H + 2] numbers.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    rows = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    rows = (rows * (H**-0.5 if scale is None else scale)).astype(q.dtype)  # [B, K, G*T, H]

    def product(keys: jax.Array) -> jax.Array:  # [B, K, G*T, keys]
        return jnp.einsum("bkrh,bksh->bkrs", rows, keys, preferred_element_type=jnp.float32)

    def product_by_slot(keys: jax.Array) -> jax.Array:
        """The same. CPUs read many keys for few queries up to twice as fast by slot as by query;
        for more the scores, which have to be turned around, cost more than that, and so they do
        for bfloat16. Without the barrier the compiler turns the product around again."""
        is_many = B * keys.shape[2] >= MANY_SLOTS and rows.shape[2] <= FEW_QUERIES
        if not is_many or keys.dtype == jnp.bfloat16:
            return product(keys)
        by_slot = jnp.einsum("bksh,bkrh->bksr", keys, rows, preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(by_slot).swapaxes(2, 3)

    def masked(raw: jax.Array, allowed: jax.Array) -> jax.Array:  # [B, K, G, T, keys]
        raw = raw.reshape(B, K, N // K, T, -1)
        raw = raw if cap is None else cap * jnp.tanh(raw / cap)
        return jnp.where(allowed[:, None, None], raw, _LOWEST)

    def scores_by_slot(keys: jax.Array, allowed: jax.Array) -> jax.Array:
        return masked(product_by_slot(keys), allowed)

    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, T, H], like the cache
    in_window = window_mask(q.shape[:2], mask, window_range)
    in_window = in_window if near is None else in_window & near.of_window()
    of_window = masked(product(k), in_window)
    if cache is None or cache_ranges is None:
        top = jax.lax.stop_gradient(of_window.max(axis=-1, keepdims=True))
        _, total, out = _weigh(of_window, v, top)
    elif slots_axis is None and _is_in_parts(cache, N * T):
        top = jax.lax.stop_gradient(of_window.max(axis=-1, keepdims=True))
        sums = _weigh(of_window, v, top)
        _, total, out = _in_parts(sums, scores_by_slot, cache, cache_ranges, layer, near)
    else:
        in_cache = of_queries(cache_ranges, _num_slots(cache))
        in_cache = in_cache if near is None else in_cache & near.of_cache()
        keys, values = cache
        of_cache = masked(at_layer(keys, layer, B, product_by_slot), in_cache)
        top = functools.reduce(
            jnp.maximum, (x.max(axis=-1, keepdims=True) for x in (of_window, of_cache))
        )
        top = jax.lax.stop_gradient(top)
        if slots_axis is not None:
            top = jax.lax.pmax(top, slots_axis)
        _, total, out = _weigh(of_window, v, top)
        weights, summed = _weights(of_cache, top, rows.dtype)
        weighed = at_layer(values, layer, B, functools.partial(_weighed, weights))
        if slots_axis is not None:
            summed, weighed = jax.lax.psum((summed, weighed), slots_axis)
        total, out = total + summed, out + weighed
    out = out / jnp.where(total > 0, total, 1.0).reshape(B, K, -1, 1)
    out = out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return out.astype(q.dtype)


def _num_slots(cache: Cache | tuple[Layers, Layers]) -> int:
    keys = cache[0]
    return keys[0].shape[2] if isinstance(keys, tuple) else keys.shape[3]


def _is_in_parts(cache: Cache | tuple[Layers, Layers], num_queries: int) -> bool:
    """Whether slots are read `SLOTS_AT_ONCE` at a time; whatever other rows there are."""
    S = _num_slots(cache)
    is_apart = isinstance(cache[0], tuple)
    fits = is_apart and S <= SLOTS_IN_PLACE and num_queries * S <= SCORES_AT_ONCE
    return S > SLOTS_AT_ONCE and not fits


def _weights(scores: jax.Array, top: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Weights [B, K, G*T, keys] of scores [B, K, G, T, keys], and their sums; `top` is above."""
    B, K, G, T, _ = scores.shape
    weights = jnp.where(scores > _LOWEST, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights.reshape(B, K, G * T, -1).astype(dtype), total


def _weighed(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[B, K, G*T, H] float32."""
    return jnp.einsum("bkrs,bksh->bkrh", weights, values, preferred_element_type=jnp.float32)


def _weigh(scores: jax.Array, values: jax.Array, top: jax.Array) -> _Sums:
    """Sums over keys with scores [B, K, G, T, keys] and values [B, K, keys, H]; `top` is above."""
    weights, total = _weights(scores, top, values.dtype)
    return top, total, _weighed(weights, values)


def _in_parts(
    sums: _Sums,
    scores: Callable[[jax.Array, jax.Array], jax.Array],
    cache: Cache | tuple[Layers, Layers],
    ranges: jax.Array,
    layer: jax.Array | int,
    near: Near | None,
) -> _Sums:
    """Adds what a cache holds to sums, `SLOTS_AT_ONCE` slots at a time; slots outside of all
    ranges are not read.

    A part that is outside of a row's ranges changes nothing of the row, whoever else reads it.
    """
    S, n, B = _num_slots(cache), SLOTS_AT_ONCE, len(ranges)

    def part_of(x: jax.Array | Layers, start: jax.Array) -> jax.Array:  # [B, K, n, H]
        if isinstance(x, tuple):
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, n, axis=2)  # noqa: E731
            return at_layer(x, layer, B, take)
        _, _, K, _, H = x.shape  # in one go: a whole layer would be a copy
        return jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), (1, B, K, n, H))[0]

    def add(sums: _Sums, first: jax.Array) -> _Sums:
        start = jnp.minimum(first, S - n)  # the last part is whole, and skips what was seen
        slot = start + jnp.arange(n)
        allowed = of_queries(ranges - start, n) & (slot >= first)[None, None]
        if near is not None:
            assert near.cached is not None
            cached = jax.lax.dynamic_slice_in_dim(near.cached, start, n, axis=1)
            allowed = allowed & near._replace(cached=cached).of_cache()
        part = scores(part_of(cache[0], start), allowed)
        top, total, out = sums
        higher = jnp.maximum(top, jax.lax.stop_gradient(part.max(axis=-1, keepdims=True)))
        _, summed, weighed = _weigh(part, part_of(cache[1], start), higher)
        factor = jnp.exp(top - higher)
        of_rows = factor.reshape(*out.shape[:-1], 1)
        return higher, total * factor + summed, out * of_rows + weighed

    def read(sums: _Sums, first: jax.Array) -> tuple[_Sums, None]:
        low, high = jnp.maximum(ranges[..., 0], first), jnp.minimum(ranges[..., 1], first + n)
        return jax.lax.cond((low < high).any(), add, lambda sums, first: sums, sums, first), None

    return jax.lax.scan(read, sums, jnp.arange(0, S, n))[0]
