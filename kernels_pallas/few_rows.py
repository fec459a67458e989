"""One row of bfloat16 times a matrix, as CPUs multiply it best."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def beside_zeros(
    product: Callable[[jax.Array, jax.Array], jax.Array], rows: jax.Array, w: jax.Array
) -> jax.Array:
    """`product` of rows [M, I] and a matrix, [M, O]; on a CPU one row is multiplied as two.

    XLA (jax 0.10 to 0.12) widens the whole matrix to float32 before it multiplies a single row by
    it, which takes ten times as long as the product of two rows. Elsewhere it is `product` alone.
    """
    if rows.shape[0] != 1 or w.dtype != jnp.bfloat16:
        return product(rows, w)
    two = lambda rows, w: product(jnp.pad(rows, ((0, 1), (0, 0))), w)[:1]  # noqa: E731
    return jax.lax.platform_dependent(rows, w, cpu=two, default=product)
