"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlm.config import ModelConfig
from dlm.params import Params


def norm(x: jax.Array, p: Params, name: str, cfg: ModelConfig) -> jax.Array:
    """What `cfg.norm` says, with the weights that `p` has under `name`."""
    if cfg.norm == "layer":
        return layer_norm(x, p[name], p[f"{name}_bias"], cfg.norm_eps)
    return rms_norm(x, p[name], cfg.norm_eps, is_offset=cfg.norm == "rms_offset")


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, is_offset: bool = False) -> jax.Array:
    """Normalises in float32, casts back, then scales: the order published checkpoints expect.

    With `is_offset` (Gemma) the scale is 1 + weight, and the cast comes last.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    weight = jax.lax.expand_dims(weight, range(x.ndim - 1))
    if is_offset:
        return (x32 * scale * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return (x32 * scale).astype(x.dtype) * weight


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Subtracts the mean, divides by the deviation, scales and shifts; all of it in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    weight, bias = (
        jax.lax.expand_dims(w.astype(jnp.float32), range(x.ndim - 1)) for w in (weight, bias)
    )
    return (centred * scale * weight + bias).astype(x.dtype)
