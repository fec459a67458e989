"""The key/value cache: every layer's keys and values for every position of a canvas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dlm.config import ModelConfig
from dlm.sharding import constrain


@struct.dataclass
class KVCache:
    """Keys (already rotated) and values of all layers.

    It has no length of its own: which slots hold something is said per call, as ranges, by whoever
    reads it (`window_attention`'s `cache_ranges`), and writes go through the same call.

    Attributes:
      k: [L, B, K, S, H] in the model's dtype: the keys of one head are one [S, H] matrix.
      v: [L, B, K, S, H] likewise.
    """

    k: jax.Array
    v: jax.Array

    @property
    def num_slots(self) -> int:
        """S, positions per row."""
        return self.k.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def init_cache(cfg: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
    """An empty cache for `batch_size` rows of at least `num_slots` positions, in `cfg.dtype`.

    There are as many slots as the GPU kernel can read: a multiple of 8.
    """
    num_slots += -num_slots % 8
    shape = (cfg.n_layers, batch_size, cfg.n_kv_heads, num_slots, cfg.head_dim)
    axes = (None, "batch", "kv_heads", None, None)
    zeros = lambda: constrain(jnp.zeros(shape, cfg.jnp_dtype), *axes)  # noqa: E731
    return KVCache(k=zeros(), v=zeros())


def up_to(start: jax.Array) -> jax.Array:
    """[B, 1, 2] int32: as `cache_ranges`, all slots below `start` [B]."""
    return jnp.stack([jnp.zeros_like(start), start], axis=1)[:, None]


def write(cache: KVCache, new: KVCache, start: jax.Array) -> KVCache:
    """Puts the slots of `new` into slots start [B] and behind it."""
    put = lambda x, new, at: jax.lax.dynamic_update_slice(x, new, (0, 0, at, 0))  # noqa: E731
    by_row = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
    return jax.tree.map(lambda x, new: by_row(x, new, start), cache, new)


def compact(cache: KVCache, start: jax.Array, index: jax.Array) -> KVCache:
    """Moves slots start + index[:, j] to start + j, in every layer.

    Args:
      cache: whose keys carry the positions that they keep.
      start: [B] int32. First slot that is written.
      index: [B, n] int32. Where, from `start`, what belongs there lies.
    """
    source = (start[:, None] + index)[None, :, None, :, None]

    kept = jax.tree.map(lambda x: jnp.take_along_axis(x, source, axis=3), cache)
    return write(cache, kept, start)  # all was read before anything is written
