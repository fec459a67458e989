"""Rotary position embeddings, in the layout that rotates one half of a head against the other.

Letters: B batch, T window positions, H head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from dlm.config import ModelConfig


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
