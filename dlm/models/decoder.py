"""One transformer for every model here: a forward over a window of positions.

Pre-norm RMSNorm, rotary embeddings in the rotate-half layout, grouped-query attention, gated SiLU
MLP. Whether attention is causal, bidirectional or tree-shaped is an argument; so is the cache.

Letters: B batch, T window positions, D model width, N query heads, K key/value heads, H head
width, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm.blocks.attention import BlockDiffusion, attend, project_qkv
from dlm.blocks.linear import linear
from dlm.blocks.mlp import mlp
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotary_angles
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.sharding import constrain
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
      mask: see `dlm.models.decoder.forward`.
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
