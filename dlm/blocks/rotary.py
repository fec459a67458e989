"""Rotary position embeddings, in the layout that rotates one half of a head against the other.

Letters: B batch, T window positions, H head width, R <= H rotary width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dlm.config import ModelConfig


class Angles(struct.PyTreeNode):
    """How far the heads of each position are turned.

    Attributes:
      cos: [B, T, 1, R / 2] float32. Cosine, times the attention factor.
      sin: [B, T, 1, R / 2] float32. Sine, likewise.
      query_scale: [B, T, 1, 1] float32. Queries are multiplied by it; None: they are not.
    """

    cos: jax.Array
    sin: jax.Array
    query_scale: jax.Array | None = None


def rotary_angles(
    positions: jax.Array,
    cfg: ModelConfig,
    *,
    length: jax.Array | None = None,
    is_local: bool = False,
) -> Angles:
    """The angles of positions [B, T] int32.

    Args:
      positions: see above.
      cfg: the model.
      length: [B] int32. The most positions that each row's text will have; only needed where
        frequencies depend on it.
      is_local: whether they are those of sliding layers that have a base of their own.

    Raises:
      ValueError: `length` is needed and not given.
    """
    theta = cfg.rope_theta
    scaling = cfg.rope_scaling
    if is_local:
        assert cfg.local_rope_theta is not None
        theta, scaling = cfg.local_rope_theta, None
    exponent = jnp.arange(0, cfg.rotary_width, 2, dtype=jnp.float32) / cfg.rotary_width
    frequency = 1.0 / theta**exponent
    factor = 1.0
    if scaling is not None:
        if scaling.needs_length and length is None:
            raise ValueError(
                f"rotary frequencies of type {scaling.kind!r} depend on how long a text becomes, "
                "which is not said here: give `length`"
            )
        frequency = scaling.stretch(frequency, theta, length)
        factor = scaling.attention_factor
    per_row = frequency.reshape(-1, 1, frequency.shape[-1])  # of one row, or of each
    angles = positions[..., None].astype(jnp.float32) * per_row
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    query_scale = None
    if cfg.query_growth is not None:
        beta, period = cfg.query_growth
        times = jnp.floor_divide(jnp.maximum(positions, 0), period).astype(jnp.float32)
        query_scale = (1 + beta * jnp.log1p(times))[..., None, None]
    return Angles(cos, sin, query_scale)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotates the first half of the rotary width against the second, in float32.

    Of heads that are wider the rest stays as it is.
    """
    cos, sin = angles.cos, angles.sin
    width = 2 * cos.shape[-1]
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32[..., :width], 2, axis=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if width < x.shape[-1]:
        parts.append(x32[..., width:])
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
