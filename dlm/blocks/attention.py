"""Attention of a window against itself and a cache, each device on its share.

Letters: B batch, T window positions, N query heads, K key/value heads, H head width, I any width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dlm.blocks.linear import to_heads
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotate
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.sharding import constrain, per_shard, slots_axis, split_axes
from dlm.window import BlockDiffusion, Slots, Window
from kernels_pallas.block_diffusion_attention import block_diffusion_attention
from kernels_pallas.window_attention import window_attention


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: Window,
    slots: Slots | None = None,
    layer: jax.Array | int = 0,
) -> tuple[jax.Array, KVCache | None]:
    """Attention, each device working on its rows, heads and slots of the cache.

    Args:
      q: [B, T, N, H]. Queries, rotated.
      k: [B, T, K, H]. The window's own keys, rotated.
      v: [B, T, K, H]. The window's own values.
      window: whose mask and range count.
      slots: the cache; None: only the window is seen.
      layer: scalar int32. Which layer of the cache is read and written.

    Returns:
      The attended values [B, T, N, H], and the written cache; None if nothing was written.

    Raises:
      ValueError: `BlockDiffusion` comes with slots or a range, or a mask with `is_causal`.
    """
    mask = window.attention
    split = split_axes(batch=q.shape[0], kv_heads=k.shape[2])
    rows, heads = split["batch"], split["kv_heads"]
    if isinstance(mask, BlockDiffusion):
        if slots is not None or window.range is not None:
            raise ValueError("BlockDiffusion sees whole windows: it goes without slots and range")
        blocks = {"q": q, "k": k, "v": v, "segment_ids": mask.segment_ids}
        by_head = dict.fromkeys("qkv", P(rows, None, heads))
        run = functools.partial(block_diffusion_attention, block_len=mask.block_len)
        specs = by_head | {"segment_ids": P(rows)}
        return per_shard(run, blocks, specs, P(rows, None, heads)), None
    operands: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "window_range": window.range,
        "layer": jnp.asarray(layer, jnp.int32),
    }
    axis = None if slots is None else slots_axis(slots.cache.num_slots)
    stacked = P(None, rows, heads, axis)
    specs = dict.fromkeys("qkv", P(rows, None, heads)) | {"window_range": P(rows), "layer": P()}
    if slots is not None:
        operands |= {
            "cache": (slots.cache.k, slots.cache.v),
            "cache_ranges": slots.ranges,
            "write_at": slots.write_at,
            "write_rows": slots.write_rows,
        }
        of_rows = ("cache_ranges", "write_at", "write_rows")
        specs |= dict.fromkeys(of_rows, P(rows)) | {"cache": stacked}
    attention = functools.partial(window_attention, slots_axis=axis)
    if isinstance(mask, str):
        attention = functools.partial(attention, mask=mask)
    else:
        operands["mask"], specs["mask"] = mask, P(rows)
    attended, written = per_shard(attention, operands, specs, (P(rows, None, heads), stacked))
    return attended, None if written is None else KVCache(*written)


def project_qkv(
    x: jax.Array, a: Params, cfg: ModelConfig, angles: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] of x [B, T, I].

    Args:
      x: normalised input.
      a: the layer's "q", "k", "v", and what `cfg` says is there besides.
      cfg: `qkv_bias`, `qk_norm` and `norm_eps` of it count.
      angles: of `rotary_angles`.
    """
    q, k, v = to_heads(x, a["q"]), to_heads(x, a["k"]), to_heads(x, a["v"])
    if cfg.qkv_bias:
        q, k, v = (
            x + a[name][None, None] for x, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias"))
        )
    if cfg.qk_norm:
        q = rms_norm(q, a["q_norm"], cfg.norm_eps)
        k = rms_norm(k, a["k_norm"], cfg.norm_eps)
    q = constrain(rotate(q, angles), "batch", None, "heads", None)
    k = constrain(rotate(k, angles), "batch", None, "kv_heads", None)
    return q, k, v
