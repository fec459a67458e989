"""Slots of a key/value cache that several devices may share: reading some, writing some.

One row at a time; callers map over rows. Where the slots are split over a mesh axis, all this runs
inside of `jax.shard_map`, and a slot's number is its number in the whole cache.

Letters: S slots (of this device), T new ones, n some of them, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Cache = tuple[jax.Array, jax.Array]  # keys and values, each [L, B, K, S, H]
Layers = tuple[jax.Array, ...]  # of a cache that lies apart: L arrays [B, K, S, H]


def at_layer(
    x: jax.Array | Layers,
    layer: jax.Array | int,
    num_rows: int,
    read: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """What is read of one layer's first rows [num_rows, K, S, H].

    Of layers that lie apart each is read where it lies, in a branch of its own; of a stack
    [L, B, K, S, H] these rows are taken out, which is a copy on CPUs.
    """
    if isinstance(x, tuple):
        return jax.lax.switch(layer, [lambda own=own: read(own[:num_rows]) for own in x])
    size = (1, num_rows, *x.shape[2:])
    return read(jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), size)[0])


def first_slot(num_slots: int, axis: str | None) -> jax.Array | int:
    """The number of this device's first slot, of which it has `num_slots`."""
    return 0 if axis is None else jax.lax.axis_index(axis) * num_slots


def put_slots(old: jax.Array, new: jax.Array, at: jax.Array, axis: str | None = None) -> jax.Array:
    """`old` [..., S, H] with `new` [..., T, H] in slots at .. at + T, as far as they are here.

    Args:
      old, new: see above.
      at: scalar int32.
      axis: the mesh axis over which slots are split, in order; None: all are here.
    """
    if axis is None:
        return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=old.ndim - 2)
    S, T = old.shape[-2], new.shape[-2]
    n = min(S, T)
    first = at - first_slot(S, axis)
    here = jnp.clip(first, 0, S - n)  # n slots, among them all that are written
    source = here - first + jnp.arange(n)
    is_new = ((source >= 0) & (source < T)).reshape((1,) * (old.ndim - 2) + (n, 1))
    before = jax.lax.dynamic_slice_in_dim(old, here, n, axis=old.ndim - 2)
    moved = jnp.take(new, jnp.clip(source, 0, T - 1), axis=-2)
    after = jnp.where(is_new, moved, before)
    return jax.lax.dynamic_update_slice_in_dim(old, after, here, axis=old.ndim - 2)


def put_windows(
    x: jax.Array,
    new: jax.Array,
    at: jax.Array,
    rows: jax.Array | None,
    layers: jax.Array,
    axis: str | None = None,
) -> jax.Array:
    """A stack of rows with a window of new slots in each, written in place where it is given away.

    Args:
      x: [L, B, K, S, H]. The slots of this device.
      new: [n, R, K, T, H]. Of the first R rows.
      at: [R] int32. First slot that is written; at + T is at most the number of slots.
      rows: [R] bool. Rows that are written; None: all of them.
      layers: [n] int32. Layers that are written, each another.
      axis: the mesh axis over which slots are split, in order; None: all are here.

    Returns:
      [L, B, K, S, H].
    """
    if axis is not None:
        old = jnp.take(x, layers, axis=0)[:, : len(at)]
        by_layer = jax.vmap(
            lambda old, new: jax.vmap(lambda old, new, at: put_slots(old, new, at, axis))(
                old, new, at
            )
        )
        written = by_layer(old, new)
        if rows is not None:
            written = jnp.where(rows[None, :, None, None, None], written, old)
        return x.at[layers, : len(at)].set(written)
    # A scatter of whole windows: an update of slices, mapped over rows, would be compiled into one
    # that turns the cache around and back, and one that reads what it keeps into one that copies.
    first = at if rows is None else jnp.where(rows, at, x.shape[3])  # beyond the end: dropped
    place = jnp.stack(
        jnp.broadcast_arrays(layers[:, None], jnp.arange(len(at))[None], first[None]), axis=-1
    )
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3, 4),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(
        x, place, new, numbers, unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )  # fmt: skip


def take_slots(old: jax.Array, slots: jax.Array, axis: str | None = None) -> jax.Array:
    """[..., n, H]: the slots [n] int32 of `old` [..., S, H], on every device.

    Args: as `put_slots`.
    """
    if axis is None:
        return jnp.take(old, slots, axis=-2, mode="clip")
    S = old.shape[-2]
    local = slots - first_slot(S, axis)
    is_here = ((local >= 0) & (local < S)).reshape((1,) * (old.ndim - 2) + (-1, 1))
    found = jnp.take(old, jnp.clip(local, 0, S - 1), axis=-2)
    return jax.lax.psum(jnp.where(is_here, found, 0), axis)
