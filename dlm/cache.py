"""The key/value cache: every layer's keys and values for every position of a canvas."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from dlm.config import ModelConfig
from dlm.params import Apart, is_apart
from dlm.sharding import constrain, per_shard, slots_axis, split_axes
from kernels_pallas.slots import put_slots, put_windows, take_slots

APART_BYTES = 512  # of keys and values, per position and layer


class KVCache(struct.PyTreeNode):
    """Keys (already rotated) and values of all layers.

    It has no length of its own: which slots hold something is said per call, as ranges, by whoever
    reads it (`dlm.window.Slots`), and writes go through the same call.

    Attributes:
      k: [L, B, K, S, H] in the model's dtype: the keys of one head are one [S, H] matrix. Or
        `Apart`, L arrays of [B, K, S, H], if `is_read_apart`.
      v: [L, B, K, S, H] likewise.
      positions: [1, B, 1, S, 1] int32. Where the keys stand, for sliding layers; None without such.
    """

    k: jax.Array | Apart
    v: jax.Array | Apart
    positions: jax.Array | None = None

    @property
    def num_slots(self) -> int:
        """S, positions per row."""
        return self.k.shape[3]

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves((self.k, self.v)))

    @property
    def num_layers(self) -> int:
        """L."""
        return self.k.shape[0]


def is_read_apart(cfg: ModelConfig) -> bool:
    """Whether layers of a cache are arrays of their own, which attention reads where they lie.

    They are on a CPU without a mesh, if a position has enough numbers for a copy to count:
    `APART_BYTES` per layer. It depends on nothing else, so caches of one model are alike.
    """
    of_position = 2 * cfg.n_kv_heads * cfg.head_dim * cfg.jnp_dtype.itemsize
    is_plain = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    return is_plain and of_position >= APART_BYTES


def init_cache(cfg: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
    """An empty cache for `batch_size` rows of at least `num_slots` positions, in `cfg.dtype`.

    Every layer has all slots, whatever a sliding window leaves of them.

    There are as many slots as the GPU kernel can read and the mesh in use can split: a multiple of
    8 on every device.
    """
    return _empty(cfg, batch_size, num_slots, is_read_apart(cfg))


def init_stacked(cfg: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
    """As `init_cache`, but never apart: for a forward that has a backward pass, whose scan would
    keep what every layer's branch needs for each of them."""
    return _empty(cfg, batch_size, num_slots, False)


def _empty(cfg: ModelConfig, batch_size: int, num_slots: int, lies_apart: bool) -> KVCache:
    multiple = 8 * dict(jax.sharding.get_abstract_mesh().shape).get("sequence", 1)
    num_slots += -num_slots % multiple
    shape = (cfg.n_layers, batch_size, cfg.n_kv_heads, num_slots, cfg.head_dim)
    axes = (None, "batch", "kv_heads", "slots", None)

    def zeros() -> jax.Array | Apart:
        if lies_apart:
            return Apart(tuple(jnp.zeros(shape[1:], cfg.jnp_dtype) for _ in range(cfg.n_layers)))
        return constrain(jnp.zeros(shape, cfg.jnp_dtype), *axes)

    positions = None
    if cfg.sliding_window is not None:
        positions = jnp.zeros((1, batch_size, 1, num_slots, 1), jnp.int32)
        positions = constrain(positions, None, "batch", None, "slots", None)
    return KVCache(k=zeros(), v=zeros(), positions=positions)


def write(
    cache: KVCache,
    new: KVCache,
    start: jax.Array,
    rows: jax.Array | None = None,
    layers: tuple[int, ...] | None = None,
) -> KVCache:
    """Puts new keys and values into slots start [B] and behind it, in place.

    Args:
      cache: see above.
      new: [n, B, K, T, H]: of T slots. Of a cache of m B rows, of the first on every device.
      start: see above.
      rows: [B] bool. Rows that are written; None: all.
      layers: the n layers that are written; None: all.
    """

    at = tuple(range(cache.num_layers)) if layers is None else layers

    def put(cache: KVCache, new: KVCache, axis: str | None, **by_row: Any) -> KVCache:
        start, rows = by_row["start"], by_row["rows"]

        def fill(x: jax.Array | Apart, new: jax.Array | Apart) -> jax.Array | Apart:
            assert not isinstance(new, Apart)  # of a window
            new = new.astype(x.dtype)
            if not isinstance(x, Apart):
                return put_windows(x, new, start, rows, jnp.array(at), axis)
            written = list(x.layers)
            for i, layer in enumerate(at):
                written[layer] = put_windows(
                    x.layers[layer][None], new[i][None], start, rows, jnp.arange(1)
                )[0]
            return Apart(tuple(written))

        return dataclasses.replace(cache, k=fill(cache.k, new.k), v=fill(cache.v, new.v))

    group = cache.k.shape[1] // len(start)
    return _per_shard(put, cache, group, new=new, start=start, rows=rows)


def fill_layer(
    cache: KVCache, new: KVCache, layer: jax.Array | int, rows: jax.Array | None
) -> KVCache:
    """Puts new keys and values [B, K, S, H] of all slots into one layer of a stacked cache.

    Args:
      cache, new: see above.
      layer: scalar int32.
      rows: [B] bool. Rows that are written; None: all.
    """

    def fill(x: jax.Array | Apart, new: jax.Array | Apart) -> jax.Array:
        assert not isinstance(x, Apart) and not isinstance(new, Apart)
        if rows is not None:
            old = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
            new = jnp.where(rows[:, None, None, None], new.astype(x.dtype), old)
        return jax.lax.dynamic_update_index_in_dim(x, new.astype(x.dtype), layer, axis=0)

    return dataclasses.replace(cache, k=fill(cache.k, new.k), v=fill(cache.v, new.v))


def write_positions(
    cache: KVCache, positions: jax.Array, start: jax.Array, rows: jax.Array | None
) -> KVCache:
    """Puts positions [B, T] into slots start [B] and behind it, of `rows` [B] bool; None: all.

    Of a cache of m B rows it is about the first on every device.
    """
    assert cache.positions is not None
    new = positions[None, :, None, :, None]

    def put(
        old: jax.Array,
        new: jax.Array,
        start: jax.Array,
        rows: jax.Array | None,
        axis: str | None,
    ) -> jax.Array:
        by_row = jax.vmap(functools.partial(put_slots, axis=axis), in_axes=(1, 1, 0), out_axes=1)
        first = old[:, : len(start)]
        written = by_row(first, new, start)
        if rows is not None:
            written = jnp.where(rows[None, :, None, None, None], written, first)
        return old.at[:, : len(start)].set(written)

    B, S = len(positions), cache.num_slots
    split, axis = split_axes(batch=B)["batch"], slots_axis(S)
    of_slots = P(None, split, None, axis)
    specs = {"old": of_slots, "new": P(None, split), "start": P(split), "rows": P(split)}
    operands = {"old": cache.positions, "new": new, "start": start, "rows": rows}
    written = per_shard(functools.partial(put, axis=axis), operands, specs, of_slots)
    return cache.replace(positions=written)


def compact(cache: KVCache, start: jax.Array, index: jax.Array) -> KVCache:
    """Moves slots start + index[:, j] to start + j, in every layer.

    Args:
      cache: whose keys carry the positions that they keep.
      start: [B] int32. First slot that is written.
      index: [B, n] int32. Where, from `start`, what belongs there lies.
    """

    def move(cache: KVCache, start: jax.Array, index: jax.Array, axis: str | None) -> KVCache:
        def one(x: jax.Array) -> jax.Array:
            take = jax.vmap(functools.partial(take_slots, axis=axis), in_axes=(1, 0), out_axes=1)
            kept = take(x, start[:, None] + index)  # all is read before anything is written
            return put_windows(x, kept, start, None, jnp.arange(len(x)), axis)

        def every(x: jax.Array | Apart) -> jax.Array | Apart:
            if isinstance(x, Apart):
                return Apart(tuple(one(layer[None])[0] for layer in x.layers))
            return one(x)

        return jax.tree.map(every, cache, is_leaf=is_apart)

    return _per_shard(move, cache, start=start, index=index)


def copy_rows(cache: KVCache, source: jax.Array, start: jax.Array, num_slots: int) -> KVCache:
    """Copies some slots of rows to other rows of the same group, in every layer.

    Nothing is copied that stays. A row that is read must stay itself, or what it had is gone.

    Args:
      cache: of B n rows: on every device with B groups, row j B + b is the j-th of its group b.
      source: [B, n] int32. Of which row of its group each is to have the slots.
      start: [B] int32. First of the slots.
      num_slots: of them. Others around those may be copied, too.
    """
    n = source.shape[1]

    def move(cache: KVCache, source: jax.Array, start: jax.Array, axis: str | None) -> KVCache:
        S = cache.num_slots
        size = min(num_slots, S)
        here = 0 if axis is None else jax.lax.axis_index(axis) * S
        first = jnp.clip(start - here, 0, S - size)
        moves = (source != jnp.arange(n)[None]).reshape(-1)
        order = jnp.argsort(~moves, stable=True)

        def copy(i: jax.Array, cache: KVCache) -> KVCache:
            b, j = order[i] // n, order[i] % n

            def one(x: jax.Array) -> jax.Array:  # [..., B n, K, S, H]
                lead = (0,) * (x.ndim - 4)
                at = lambda j: (*lead, j * len(source) + b, 0, first[b], 0)  # noqa: E731
                part = (*x.shape[: x.ndim - 4], 1, x.shape[-3], size, x.shape[-1])
                taken = jax.lax.dynamic_slice(x, at(source[b, j]), part)
                return jax.lax.dynamic_update_slice(x, taken, at(j))

            def every(x: jax.Array | Apart) -> jax.Array | Apart:
                return Apart(tuple(map(one, x.layers))) if isinstance(x, Apart) else one(x)

            return jax.tree.map(every, cache, is_leaf=is_apart)

        copied: KVCache = jax.lax.fori_loop(0, moves.sum(), copy, cache)
        return copied

    return _per_shard(move, cache, group=n, source=source, start=start)


def _per_shard(
    function: Callable[..., KVCache],
    cache: KVCache,
    group: int = 1,
    **operands: jax.Array | KVCache | None,
) -> KVCache:
    """On every device's part; `function` is told over which axis of the mesh slots are split.

    So many rows stay on one device, and have one row of the operands.
    """
    _, B, K, S, _ = cache.k.shape
    split = split_axes(batch=B // group, kv_heads=K)
    rows, heads, slots = split["batch"], split["kv_heads"], slots_axis(S)
    stored = P(None, rows, heads, slots)
    places = None if cache.positions is None else P(None, rows, None, slots)
    specs: dict[str, Any] = dict.fromkeys(operands, P(rows))
    specs["cache"] = KVCache(k=stored, v=stored, positions=places)  # type: ignore[arg-type]
    if "new" in operands:
        specs["new"] = P(None, rows, heads)
    run = functools.partial(function, axis=slots)
    written: KVCache = per_shard(run, {"cache": cache, **operands}, specs, specs["cache"])
    return written
