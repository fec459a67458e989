"""Which of many sets to try next: the upper confidence bound of a Gaussian process over sets.

Matern 5/2 in the root of the number of elements that differ, with a fixed length scale: half the
root of the number of elements.

Letters: M sets that were tried, C sets that are proposed, n elements.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

KAPPA, NOISE = 2.5, 1e-2


def upper_bound(
    sets: jax.Array, scores: jax.Array, is_known: jax.Array, proposed: jax.Array
) -> jax.Array:
    """Upper confidence bounds of a Gaussian process at proposed sets, in deviations of the scores.

    Args:
      sets: [M, n] bool. That were tried.
      scores: [M] float32. What they got.
      is_known: [M] bool. Of which there is a score.
      proposed: [C, n] bool.

    Returns:
      [C] float32.
    """
    scale = jnp.sqrt(sets.shape[1]) / 2

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = 2.0 * a - 1, 2.0 * b - 1  # the product is that of equals less that of others
        differ = (sets.shape[1] - a @ b.T) / 2
        r = jnp.sqrt(5 * differ) / scale
        return (1 + r + r * r / 3) * jnp.exp(-r)

    num = jnp.maximum(is_known.sum(), 1)
    mean = jnp.where(is_known, scores, 0).sum() / num
    off = jnp.where(is_known, scores - mean, 0)
    off /= jnp.maximum(jnp.sqrt((off * off).sum() / num), 1e-6)
    both = is_known[:, None] & is_known[None]
    among = jnp.where(both, kernel(sets, sets), 0)
    among += jnp.diag(jnp.where(is_known, NOISE, 1.0))
    across = jnp.where(is_known[None], kernel(proposed, sets), 0)  # [C, M]
    factor = jax.scipy.linalg.cho_factor(among, lower=True)
    expected = across @ jax.scipy.linalg.cho_solve(factor, off)
    explained = (across * jax.scipy.linalg.cho_solve(factor, across.T).T).sum(axis=1)
    return expected + KAPPA * jnp.sqrt(jnp.maximum(1 - explained, 0))
