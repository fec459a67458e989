"""Attention of a window against itself and a cache, each device on its share.

Letters: B batch, T window positions, N query heads, K key/value heads, H head width, I any width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import struct
from jax.sharding import PartitionSpec as P

from dlm.blocks.linear import to_heads
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotate
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.sharding import constrain, per_shard, slots_axis, split_axes
from kernels_pallas.block_diffusion_attention import block_diffusion_attention
from kernels_pallas.window_attention import Mask, window_attention


class BlockDiffusion(struct.PyTreeNode):
    """Attention of a [noisy ; clean] window, see `kernels_pallas.block_diffusion_attention`.

    Attributes:
      segment_ids: [B, T / 2] int32. Positions attend within their segment.
      block_len: positions per block. Static.
    """

    segment_ids: jax.Array
    block_len: int = struct.field(pytree_node=False)


def attend(
    mask: Mask | BlockDiffusion, **operands: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Attention, each device working on its rows, heads and slots of the cache."""
    q, k = operands["q"], operands["k"]
    split = split_axes(batch=q.shape[0], kv_heads=k.shape[2])
    rows, heads = split["batch"], split["kv_heads"]
    if isinstance(mask, BlockDiffusion):
        operands = {name: operands[name] for name in "qkv"} | {"segment_ids": mask.segment_ids}
        by_head = dict.fromkeys("qkv", P(rows, None, heads))
        run = functools.partial(block_diffusion_attention, block_len=mask.block_len)
        specs = by_head | {"segment_ids": P(rows)}
        return per_shard(run, operands, specs, P(rows, None, heads)), None
    cache = operands.get("cache")
    slots = None if cache is None else slots_axis(cache[0].shape[3])
    stacked = P(None, rows, heads, slots)
    specs = dict.fromkeys(operands, P(rows)) | {"cache": stacked, "layer": P()}
    specs |= dict.fromkeys("qkv", P(rows, None, heads))
    attend = functools.partial(window_attention, slots_axis=slots)
    if isinstance(mask, str):
        attend = functools.partial(attend, mask=mask)
    else:
        operands["mask"], specs["mask"] = mask, P(rows)
    return per_shard(attend, operands, specs, (P(rows, None, heads), stacked))


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
