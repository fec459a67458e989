"""One transformer for every model here: a forward over a window of positions.

Pre-norm RMSNorm, rotary embeddings in the rotate-half layout, grouped-query attention, gated SiLU
MLP. Whether attention is causal, bidirectional or tree-shaped is an argument; so is the cache.

Letters: B batch, T window positions, D model width, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import LowRank, Params
from dlm.sharding import constrain, split_axes
from kernels_pallas.block_diffusion_attention import block_diffusion_attention
from kernels_pallas.unembed_loss import TargetStats, unembed_loss
from kernels_pallas.unembed_stats import Noise, VocabStats, unembed_logits, unembed_stats
from kernels_pallas.window_attention import Mask, window_attention


class BlockDiffusion(struct.PyTreeNode):
    """Attention of a [noisy ; clean] window, see `kernels_pallas.block_diffusion_attention`.

    Attributes:
      segment_ids: [B, T / 2] int32. Positions attend within their segment.
      block_len: positions per block. Static.
    """

    segment_ids: jax.Array
    block_len: int = struct.field(pytree_node=False)


@struct.dataclass
class ForwardOutput:
    """What a forward returns.

    Attributes:
      hidden: [B, T, D] in the model's dtype. Final hidden states, normalised: multiply by
        `output_head` for logits.
      cache: the written cache, or the one that was given.
    """

    hidden: jax.Array
    cache: KVCache | None


def forward(
    params: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    *,
    positions: jax.Array,
    mask: Mask | BlockDiffusion = "full",
    window_range: jax.Array | None = None,
    cache: KVCache | None = None,
    cache_ranges: jax.Array | None = None,
    write_at: jax.Array | None = None,
    write_rows: jax.Array | None = None,
    mix: tuple[jax.Array, jax.Array] | None = None,
    remat: bool = False,
) -> ForwardOutput:
    """Runs the model over a window of positions.

    Args:
      params: as `param_specs(cfg)`.
      cfg: the model.
      tokens: [B, T] int32. The window's tokens.
      positions: [B, T] int32. Rotary positions; row b's first real token is at 0.
      mask: attention inside the window: "full" (bidirectional), "causal", ancestor bits as in
        `window_attention`, or `BlockDiffusion`, which goes with neither a cache nor a range.
      window_range: [B, 2] int32. Window positions that are real; None: all.
      cache: keys and values of other positions.
      cache_ranges: [B, R, 2] int32. Cache slots that are attended to; None: none.
      write_at: [B] int32. Slot at which the window's keys and values are written; None: they are
        not kept.
      write_rows: [B] bool. Rows whose cache is written; None: all.
      mix: weights [B, T] and vectors [B, T, D] float32: embeddings become (1 - w) x + w v.
      remat: whether to recompute each layer in the backward pass instead of keeping its
        activations.

    Returns:
      Hidden states of the window and the cache.
    """
    angles = _rotary_angles(positions, cfg)
    x = params["embed"].at[tokens].get(mode="clip")  # [B, T, D]
    if mix is not None:
        weight = mix[0][..., None]
        x = ((1 - weight) * x.astype(jnp.float32) + weight * mix[1]).astype(x.dtype)
    x = constrain(x, "batch", None, None)

    def layer(
        carry: tuple[jax.Array, KVCache | None], xs: tuple[Params, jax.Array]
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        x, written = carry
        p, index = xs
        with jax.named_scope("attention"):
            source = written if written is not None else cache
            q, k, v = _project_qkv(_rms_norm(x, p["attention_norm"], cfg.norm_eps), p, cfg, angles)
            attended, new = _attend(
                mask,
                q=q,
                k=k,
                v=v,
                window_range=window_range,
                cache=None if source is None else (source.k, source.v),
                cache_ranges=cache_ranges,
                layer=index,
                write_at=write_at,
                write_rows=write_rows,
            )
            if new is not None:
                written = KVCache(*new)
            x = x + _linear(attended, p["attention"]["o"], num_in=2)
        with jax.named_scope("mlp"):
            h = _rms_norm(x, p["mlp_norm"], cfg.norm_eps)
            gate, up = _linear(h, p["mlp"]["gate"]), _linear(h, p["mlp"]["up"])
            x = x + _linear(jax.nn.silu(gate) * up, p["mlp"]["down"])
        return (constrain(x, "batch", None, None), written), None

    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    carried = cache if write_at is not None else None
    (x, written), _ = jax.lax.scan(body, (x, carried), (params["layers"], jnp.arange(cfg.n_layers)))
    hidden = _rms_norm(x, params["final_norm"], cfg.norm_eps)
    return ForwardOutput(hidden=hidden, cache=cache if written is None else written)


def output_head(params: Params) -> jax.Array:
    """[V, D]. Logits are hidden states times its transpose; tied models share the embedding."""
    return params["unembed"] if "unembed" in params else params["embed"]


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[..., V] float32 logits of hidden states [..., D].

    Output i is about token i, or about token i + 1 if `cfg.shifted_logits`.
    """
    flat = unembed_logits(hidden.reshape(-1, hidden.shape[-1]), output_head(params))
    return flat.reshape(*hidden.shape[:-1], -1)


def vocab_stats(
    params: Params,
    hidden: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """`unembed_stats` of hidden states [M, D], each device reading its share of the vocabulary."""
    head = output_head(params)
    split = split_axes(batch=hidden.shape[0], vocab=head.shape[0])
    rows, vocab = P(split["batch"]), split["vocab"]
    operands = {
        "hidden": hidden,
        "head": head,
        "banned_ids": banned_ids,
        "noise": noise,
        "given_ids": given_ids,
    }
    specs = {
        "hidden": rows,
        "head": P(vocab),
        "banned_ids": P(),
        "given_ids": rows,
        "noise": jax.tree.map(lambda x: rows if x.ndim else P(), noise),
    }
    return _per_shard(
        functools.partial(unembed_stats, k=k, vocab_axis=vocab), operands, specs, rows
    )


def target_stats(params: Params, hidden: jax.Array, targets: jax.Array) -> TargetStats:
    """What the model says about the right tokens; differentiable, see `unembed_loss`.

    Args:
      params: the model's.
      hidden: [..., D]. Final hidden states.
      targets: [...] int32. The token that each of them should predict.

    Returns:
      Statistics of shape [...].
    """
    head, rows = output_head(params), hidden.reshape(-1, hidden.shape[-1])
    split = split_axes(batch=rows.shape[0], vocab=head.shape[0])
    batch, vocab = P(split["batch"]), split["vocab"]
    out = _per_shard(
        functools.partial(unembed_loss, vocab_axis=vocab),
        {"hidden": rows, "head": head, "targets": targets.reshape(-1)},
        {"hidden": batch, "head": P(vocab), "targets": batch},
        batch,
    )
    return jax.tree.map(lambda x: x.reshape(targets.shape), out)


def _attend(
    mask: Mask | BlockDiffusion, **operands: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Attention, each device working on its rows and heads."""
    q, k = operands["q"], operands["k"]
    split = split_axes(batch=q.shape[0], kv_heads=k.shape[2])
    rows, heads = split["batch"], split["kv_heads"]
    if isinstance(mask, BlockDiffusion):
        operands = {name: operands[name] for name in "qkv"} | {"segment_ids": mask.segment_ids}
        by_head = dict.fromkeys("qkv", P(rows, None, heads))
        run = functools.partial(block_diffusion_attention, block_len=mask.block_len)
        specs = by_head | {"segment_ids": P(rows)}
        return _per_shard(run, operands, specs, P(rows, None, heads)), None
    stacked = P(None, rows, heads)
    specs = dict.fromkeys(operands, P(rows)) | {"cache": stacked, "layer": P()}
    specs |= dict.fromkeys("qkv", P(rows, None, heads))
    attend = window_attention
    if isinstance(mask, str):
        attend = functools.partial(attend, mask=mask)
    else:
        operands["mask"], specs["mask"] = mask, P(rows)
    return _per_shard(attend, operands, specs, (P(rows, None, heads), stacked))


def _per_shard(
    function: Any, operands: dict[str, Any], specs: dict[str, Any], out_specs: Any
) -> Any:
    """Calls `function` with `operands` by name: on every device's share of them, on a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(**operands)
    run = lambda operands: function(**operands)  # noqa: E731
    return jax.shard_map(run, in_specs=(specs,), out_specs=out_specs, check_vma=False)(operands)


def _project_qkv(
    x: jax.Array, p: Params, cfg: ModelConfig, angles: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [B, T, N, H], rotated keys and values [B, T, K, H]."""
    a: dict[str, Any] = p["attention"]
    q, k, v = _heads(x, a["q"]), _heads(x, a["k"]), _heads(x, a["v"])
    if cfg.qkv_bias:
        q, k, v = (
            x + a[name][None, None] for x, name in ((q, "q_bias"), (k, "k_bias"), (v, "v_bias"))
        )
    if cfg.qk_norm:
        q = _rms_norm(q, a["q_norm"], cfg.norm_eps)
        k = _rms_norm(k, a["k_norm"], cfg.norm_eps)
    q = constrain(_rotate(q, angles), "batch", None, "heads", None)
    k = constrain(_rotate(k, angles), "batch", None, "kv_heads", None)
    return q, k, v


def _heads(x: jax.Array, w: jax.Array | LowRank) -> jax.Array:
    """x [B, T, D] times w [heads, H, D]: [B, T, heads, H]."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, LowRank):
        weight, change = w.weight, _low_rank(rows, w)
    else:
        weight, change = w, None
    flat = weight.reshape(-1, weight.shape[-1])
    product = jax.lax.dot_general(rows, flat, (((1,), (1,)), ((), ())))
    product = product if change is None else product + change
    return product.reshape(*x.shape[:2], *weight.shape[:2])


def _linear(x: jax.Array, w: jax.Array | LowRank, num_in: int = 1) -> jax.Array:
    """x [B, T, *in] times w [*in, *out], as one two-dimensional product.

    Products of more dimensions are several times slower in the backward pass on CPU.
    """
    B, T = x.shape[:2]
    rows = x.reshape(B * T, -1)
    if isinstance(w, LowRank):
        weight, change = w.weight, _low_rank(rows, w)
    else:
        weight, change = w, None
    product = jnp.dot(rows, weight.reshape(rows.shape[1], -1))
    product = product if change is None else product + change
    return product.reshape(B, T, *weight.shape[num_in:])


def _low_rank(rows: jax.Array, w: LowRank) -> jax.Array:
    """What the change of a weight adds to the product of rows [M, I]: [M, O]."""
    return jnp.dot(jnp.dot(rows, w.down), w.up) * w.scale


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalises in float32, casts back, then scales: the order published checkpoints expect."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * jax.lax.expand_dims(weight, range(x.ndim - 1))


def _rotary_angles(positions: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
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


def _rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first half of the head width against the second, in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
