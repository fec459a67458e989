"""One transformer for every model here: a forward over a window of positions.

Pre-norm RMSNorm, rotary embeddings in the rotate-half layout, grouped-query attention, gated SiLU
MLP. Whether attention is causal, bidirectional or tree-shaped is an argument; so is the cache.

Letters: B batch, T window positions, D model width, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.layers import BlockDiffusion, decoder_layer, rms_norm, rotary_angles
from dlm.params import Params
from dlm.sharding import constrain, per_shard, split_axes
from kernels_pallas.unembed_loss import TargetStats, unembed_loss
from kernels_pallas.unembed_stats import Noise, VocabStats, unembed_logits, unembed_stats
from kernels_pallas.window_attention import Mask


@struct.dataclass
class ForwardOutput:
    """What a forward returns.

    Attributes:
      hidden: [B, T, D] in the model's dtype. Final hidden states, normalised: multiply by
        `output_head` for logits.
      cache: the written cache, or the one that was given.
      features: [B, T, n * D] in the model's dtype. The residual stream at the n `feature_layers`,
        side by side; None if there are none.
    """

    hidden: jax.Array
    cache: KVCache | None
    features: jax.Array | None = None


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
    feature_layers: tuple[int, ...] = (),
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
      feature_layers: indices of layers, at whose entrance the residual stream is kept as a
        feature; `cfg.n_layers` is what leaves the last one, before the final norm. Static.
      remat: whether to recompute each layer in the backward pass instead of keeping its
        activations.

    Returns:
      Hidden states of the window, the cache, features.
    """
    angles = rotary_angles(positions, cfg)
    x = params["embed"].at[tokens].get(mode="clip")  # [B, T, D]
    if mix is not None:
        weight = mix[0][..., None]
        x = ((1 - weight) * x.astype(jnp.float32) + weight * mix[1]).astype(x.dtype)
    x = constrain(x, "batch", None, None)

    kept, keep = _feature_buffer(cfg, feature_layers, x)

    def layer(carry: Any, xs: tuple[Params, jax.Array]) -> tuple[Any, None]:
        x, written, kept = carry
        p, index = xs
        kept = keep(kept, index, x)
        source = written if written is not None else cache
        x, new = decoder_layer(
            x,
            p,
            cfg,
            angles,
            mask,
            window_range=window_range,
            cache=None if source is None else (source.k, source.v),
            cache_ranges=cache_ranges,
            layer=index,
            write_at=write_at,
            write_rows=write_rows,
        )
        return (x, written if new is None else KVCache(*new), kept), None

    body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    carry = (x, cache if write_at is not None else None, kept)
    carry, _ = jax.lax.scan(body, carry, (params["layers"], jnp.arange(cfg.n_layers)))
    x, written, kept = carry
    kept = keep(kept, cfg.n_layers, x)
    return ForwardOutput(
        hidden=rms_norm(x, params["final_norm"], cfg.norm_eps),
        cache=cache if written is None else written,
        features=None if kept is None else jnp.concatenate([*kept[:-1]], axis=-1),
    )


def _feature_buffer(
    cfg: ModelConfig, layers: tuple[int, ...], x: jax.Array
) -> tuple[jax.Array | None, Callable[..., jax.Array | None]]:
    """Where features are kept [n + 1, B, T, D], the last for what nobody asked for; how to."""
    if not layers:
        return None, lambda kept, layer, x: None
    slots = np.full(cfg.n_layers + 1, len(layers))
    slots[list(layers)] = range(len(layers))
    buffer = constrain(jnp.zeros((len(layers) + 1, *x.shape), x.dtype), None, "batch", None, None)
    return buffer, lambda kept, layer, x: kept.at[jnp.asarray(slots)[layer]].set(x)


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
    return per_shard(functools.partial(unembed_stats, k=k, vocab_axis=vocab), operands, specs, rows)


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
    out = per_shard(
        functools.partial(unembed_loss, vocab_axis=vocab),
        {"hidden": rows, "head": head, "targets": targets.reshape(-1)},
        {"hidden": batch, "head": P(vocab), "targets": batch},
        batch,
    )
    return jax.tree.map(lambda x: x.reshape(targets.shape), out)
