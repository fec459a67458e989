"""Times of the reverse process, as Dream's rules share them.

Reference: Ye et al., "Dream 7B", arXiv:2508.15487, `diffusion_generate` of the public code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def decided_share(step: jax.Array, steps: jax.Array | int, eps: jax.Array | float) -> jax.Array:
    """1 - t_{i+1} / t_i at steps i [B], float32 [B]; 1 from the last step on.

    The share of the masks of time t_i that Dream decides by time t_{i+1}.
    """

    def time(i: jax.Array) -> jax.Array:
        """linspace(1, eps, steps + 1)[i] in float32, filled from both ends like the original."""
        total = jnp.asarray(steps, jnp.float32)
        end = jnp.asarray(eps, jnp.float32)
        delta = (end - 1) / total
        i = i.astype(jnp.float32)
        return jnp.where(i < (total + 1) / 2, 1 + delta * i, end - delta * (total - i))

    is_last = step >= jnp.asarray(steps, jnp.int32) - 1
    return jnp.where(is_last, 1.0, 1 - time(step + 1) / time(step))
