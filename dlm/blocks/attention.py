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
from dlm.blocks.rotary import Angles, rotate
from dlm.config import ModelConfig
from dlm.params import Apart, Params
from dlm.sharding import constrain, per_shard, slots_axis, split_axes
from dlm.window import BlockDiffusion, Slots, Window
from kernels_pallas.block_diffusion_attention import block_diffusion_attention
from kernels_pallas.window_attention import Near, window_attention


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: Window,
    slots: Slots | None = None,
    layer: jax.Array | int = 0,
    *,
    reach: jax.Array | int | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Attention, each device working on its rows, heads and slots of the cache.

    Args:
      q: [B, T, N, H]. Queries, rotated.
      k: [B, T, K, H]. The window's own keys, rotated.
      v: [B, T, K, H]. The window's own values.
      window: whose mask and range count.
      slots: the cache; None: only the window is seen.
      layer: scalar int32. Which layer of the cache is read.
      reach: only keys at positions less than this away are seen; None: all.
      scale: scores are multiplied by it; None: H^(-1/2).
      cap: c of c tanh(z / c), which scores z go through; None: they do not.

    Returns:
      The attended values [B, T, N, H].

    Raises:
      ValueError: `BlockDiffusion` comes with slots or a range, or with what it does not know; a
        mask comes with `is_causal`; `reach` comes with a cache that has no positions.
    """
    mask = window.attention
    split = split_axes(batch=q.shape[0], kv_heads=k.shape[2])
    rows, heads = split["batch"], split["kv_heads"]
    if isinstance(mask, BlockDiffusion):
        if slots is not None or window.range is not None:
            raise ValueError("BlockDiffusion sees whole windows: it goes without slots and range")
        if any(option is not None for option in (reach, scale, cap)):
            raise ValueError(
                "BlockDiffusion attention has neither sliding windows nor scales or caps of scores "
                "of its own, one of which the model has"
            )
        blocks = {"q": q, "k": k, "v": v, "segment_ids": mask.segment_ids}
        by_head = dict.fromkeys("qkv", P(rows, None, heads))
        run = functools.partial(
            block_diffusion_attention, block_len=mask.block_len, context_len=mask.context_len
        )
        of_blocks = by_head | {"segment_ids": P(rows)}
        return per_shard(run, blocks, of_blocks, P(rows, None, heads))
    operands: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "window_range": window.range,
        "layer": jnp.asarray(layer, jnp.int32),
    }
    axis = None if slots is None else slots_axis(slots.cache.num_slots)
    specs: dict[str, Any] = dict.fromkeys("qkv", P(rows, None, heads))
    specs |= {"window_range": P(rows), "layer": P()}
    if slots is not None:
        operands |= {
            "cache": tuple(
                x.layers if isinstance(x, Apart) else x for x in (slots.cache.k, slots.cache.v)
            ),
            "cache_ranges": slots.ranges,
        }
        specs |= {"cache_ranges": P(rows), "cache": P(None, rows, heads, axis)}
    if reach is not None:
        cached = None if slots is None or slots.ranges is None else slots.cache.positions
        if slots is not None and slots.ranges is not None and cached is None:
            raise ValueError("sliding layers need a cache with positions, as `init_cache` makes it")
        cached = None if cached is None else cached[0, :, 0, :, 0]
        operands["near"] = Near(jnp.asarray(reach, jnp.int32), window.positions, cached)
        specs["near"] = Near(*(P(), P(rows), P(rows, axis)))  # type: ignore[arg-type]
    attention = functools.partial(window_attention, slots_axis=axis, scale=scale, cap=cap)
    if isinstance(mask, str):
        attention = functools.partial(attention, mask=mask)
    else:
        operands["mask"], specs["mask"] = mask, P(rows)
    return per_shard(attention, operands, specs, P(rows, None, heads))


def project_qkv(
    x: jax.Array, a: Params, cfg: ModelConfig, angles: Angles | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H] of x [B, T, I].

    Args:
      x: normalised input.
      a: the layer's "q", "k", "v", which may be one "qkv" (see `dlm.params.JOINED`), and what `cfg`
        says is there besides.
      cfg: what it says of queries, keys and values counts.
      angles: of `rotary_angles`; None: nothing is rotated.
    """
    if "qkv" in a:
        ends = [cfg.n_heads, cfg.n_heads + cfg.n_kv_heads]
        q, k, v = jnp.split(to_heads(x, a["qkv"]), ends, axis=2)
    else:
        q, k, v = (to_heads(x, a[name]) for name in "qkv")
    if cfg.qkv_bias:
        q, k, v = (
            x + a[name][None, None] for x, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias"))
        )
    if cfg.qk_norm:
        q, k = _norm_heads(q, a["q_norm"], cfg), _norm_heads(k, a["k_norm"], cfg)
    if cfg.clip_qkv is not None:
        q, k, v = (jnp.clip(x, -cfg.clip_qkv, cfg.clip_qkv) for x in (q, k, v))
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
        if angles.query_scale is not None:
            q = (q * angles.query_scale).astype(q.dtype)
    q = constrain(q, "batch", None, "heads", None)
    k = constrain(k, "batch", None, "kv_heads", None)
    return q, k, v


def _norm_heads(x: jax.Array, weight: jax.Array, cfg: ModelConfig) -> jax.Array:
    """x [B, T, heads, H], each head normalised, or with `joint_qk_norm` all of them at once."""
    is_offset = cfg.norm == "rms_offset"
    if not cfg.joint_qk_norm:
        return rms_norm(x, weight, cfg.norm_eps, is_offset=is_offset)
    flat = x.reshape(*x.shape[:2], -1)
    return rms_norm(flat, weight.reshape(-1), cfg.norm_eps, is_offset=is_offset).reshape(x.shape)
