"""Noise that makes a sample out of an arg-max, the same in every tiling and on every device.

Letters: M rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


class Noise(struct.PyTreeNode):
    """What makes a sample of softmax(z / temperature) out of an arg-max.

    Attributes:
      key: [M, 2] uint32. One random stream per row; noise depends on it and on the vocabulary id
        only, so it is the same for every tiling, batch and device layout.
      temperature: scalar float32 > 0.
    """

    key: jax.Array
    temperature: jax.Array


def gumbel_noise(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise for given vocabulary ids, from 64 random bits each.

    -log(-log u) in float32 with a 24-bit u cuts the tail that wins arg-maxes over large
    vocabularies, and so samples at too low a temperature (Zheng et al., "Masked Diffusion Models
    are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling",
    arXiv:2409.02908). Here w = 1 - u is built from two 32-bit words, so it keeps full relative
    precision down to 2^-64, and -log u = -log1p(-w).

    Args:
      key: [M, 2] uint32. A stream per row.
      ids: [n] or [1, n] int. Vocabulary ids.

    Returns:
      [M, n] float32; a function of (key row, id) alone.
    """
    counter = ids.astype(jnp.uint32).reshape(1, -1)
    high, low = threefry2x32(key[:, :1], key[:, 1:], counter, jnp.zeros_like(counter))
    w = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    exponential = -jnp.log1p(-jnp.minimum(w, 1 - 2.0**-24))
    return -jnp.log(exponential)


def threefry2x32(
    key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds: two random uint32 words per (key, counter), elementwise.

    Written out, rather than taken from `jax.random`, so that a tile of noise can be drawn inside
    any kernel. Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for r in rotations[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(r)) | (x1 >> jnp.uint32(32 - r))
            x1 = x1 ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
