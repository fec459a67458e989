"""One row times a matrix of bfloat16: the same numbers, and no wider copy of the matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.blocks.linear import product
from kernels_pallas.few_rows import beside_zeros
from kernels_pallas.unembed_stats.xla import matmul


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_row_is_what_it_is_among_others(axis, dtype):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(3, 64)), dtype)
    w = jnp.asarray(rng.normal(size=(64, 96) if axis == 0 else (96, 64)), dtype)
    multiply = jax.jit(functools.partial(product, axis=axis))
    np.testing.assert_allclose(
        multiply(rows[:1], w=w).astype(np.float32), multiply(rows, w=w)[:1].astype(np.float32),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("multiply", [matmul, functools.partial(product, axis=1)])
def test_cpus_make_no_wider_copy(multiply):
    row, w = jnp.ones((1, 64), jnp.bfloat16), jnp.ones((96, 64), jnp.bfloat16)
    plain = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    widens = lambda f, rows: "f32[96,64]" in jax.jit(f).lower(rows, w).compile().as_text()
    if widens(plain, jnp.repeat(row, 2, axis=0)):
        pytest.skip("this CPU does not multiply bfloat16")
    assert not widens(multiply, row)
    assert widens(plain, row)  # else there is no need for `beside_zeros` any more
    np.testing.assert_array_equal(beside_zeros(plain, row, w), np.full((1, 96), 64))
