"""The parts of a transformer's layer, for the model and for the small networks beside it.

Letters: B batch, T window positions, D width, N query heads, K key/value heads, H head width,
F MLP width, I any width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from dlm.config import ModelConfig
from dlm.params import LowRank, Params
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


def decoder_layer(
    x: jax.Array,
    p: Params,
    cfg: ModelConfig,
    angles: tuple[jax.Array, jax.Array],
    mask: Mask | BlockDiffusion,
    **where: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """One layer.

    Args:
      x: [B, T, D]. The residual stream.
      p: {"attention_norm", "attention", "mlp_norm", "mlp"}.
      cfg: the model.
      angles: of `rotary_angles`.
      mask: see `dlm.transformer.forward`.
      **where: window_range, cache, cache_ranges, layer, write_at and write_rows of
        `window_attention`.

    Returns:
      [B, T, D], and the cache's keys and values if they were written.
    """
    with jax.named_scope("attention"):
        h = rms_norm(x, p["attention_norm"], cfg.norm_eps)
        q, k, v = project_qkv(h, p["attention"], cfg, angles)
        attended, written = attend(mask, q=q, k=k, v=v, **where)
        x = x + linear(attended, p["attention"]["o"], num_in=2)
    with jax.named_scope("mlp"):
        x = x + mlp(rms_norm(x, p["mlp_norm"], cfg.norm_eps), p["mlp"])
    return constrain(x, "batch", None, None), written


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


def mlp(x: jax.Array, p: Params) -> jax.Array:
    """The gated MLP of `p` {"gate", "up", "down"} on x [B, T, D]."""
    return linear(jax.nn.silu(linear(x, p["gate"])) * linear(x, p["up"]), p["down"])


def to_heads(x: jax.Array, w: jax.Array | LowRank) -> jax.Array:
    """x [B, T, D] times w [heads, H, D]: [B, T, heads, H]."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, LowRank):
        weight, change = w.weight, low_rank(rows, w)
    else:
        weight, change = w, None
    flat = weight.reshape(-1, weight.shape[-1])
    product = jax.lax.dot_general(rows, flat, (((1,), (1,)), ((), ())))
    product = product if change is None else product + change
    return product.reshape(*x.shape[:2], *weight.shape[:2])


def linear(x: jax.Array, w: jax.Array | LowRank, num_in: int = 1) -> jax.Array:
    """x [B, T, *in] times w [*in, *out], as one two-dimensional product.

    Products of more dimensions are several times slower in the backward pass on CPU.
    """
    B, T = x.shape[:2]
    rows = x.reshape(B * T, -1)
    if isinstance(w, LowRank):
        weight, change = w.weight, low_rank(rows, w)
    else:
        weight, change = w, None
    product = jnp.dot(rows, weight.reshape(rows.shape[1], -1))
    product = product if change is None else product + change
    return product.reshape(B, T, *weight.shape[num_in:])


def low_rank(rows: jax.Array, w: LowRank) -> jax.Array:
    """What the change of a weight adds to the product of rows [M, I]: [M, O]."""
    return jnp.dot(jnp.dot(rows, w.down), w.up) * w.scale


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises in float32, casts back, then scales: the order published checkpoints expect."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * jax.lax.expand_dims(weight, range(x.ndim - 1))


def rotary_angles(positions: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, [B, T, 1, H/2] float32."""
    exponent = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32) / cfg.head_dim
    frequency = 1.0 / cfg.rope_theta**exponent
    if (scaling := cfg.rope_scaling) is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    angles = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first half of the head width against the second, in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
