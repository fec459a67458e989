"""Products of few rows with a large matrix, as CPUs do them best."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

MOST_ROWS = 64  # with more, the rows cost and not the matrix
FILLED_FROM, MOST_ADDED = 5, 7  # rows
LARGE = 2**16  # numbers of a matrix; smaller ones stay near, and any order will do


def times_rows_of(rows: jax.Array, w: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """rows [M, I] times w [O, I], over I: [M, O].

    On a CPU few rows take as long as reading the matrix does, which XLA (jax 0.10 to 0.12) does
    twice if it is the second factor: it is copied into another order first. So in float32 it is the
    first one here, and what comes out is turned; 8 rows then take two thirds of the time. Up to 7
    rows less than 8, 16, 32 or 64 take longer than these, by a third at worst, so rows are filled
    up; 2 to 4 take the same. In bfloat16 that gains nothing, but a single row is multiplied as two:
    else the whole matrix is widened to float32, which takes ten times as long.

    Args:
      rows: of the dtype of `w`.
      w: the matrix.
      dtype: of the sums and of what comes out; None: of the rows.
    """
    product = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    )
    M = rows.shape[0]
    if w.size < LARGE:
        return product(rows, w)
    if w.dtype == jnp.float32 and 1 < M <= MOST_ROWS:
        power = 1 << (M - 1).bit_length()
        more = power - M if M >= FILLED_FROM and power - M <= MOST_ADDED else 0

        def on_cpu(rows: jax.Array, w: jax.Array) -> jax.Array:
            turned = product(w, jnp.pad(rows, ((0, more), (0, 0))))
            # Without the barrier XLA turns the product itself around.
            return jax.lax.optimization_barrier(turned).T[:M]

    elif w.dtype == jnp.bfloat16 and M == 1:

        def on_cpu(rows: jax.Array, w: jax.Array) -> jax.Array:
            return product(jnp.pad(rows, ((0, 1), (0, 0))), w)[:1]

    else:
        return product(rows, w)
    return jax.lax.platform_dependent(rows, w, cpu=on_cpu, default=product)
