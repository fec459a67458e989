"""Few rows times a large matrix: the same numbers, in the way that CPUs do them best."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.blocks.linear import product
from kernels_pallas.few_rows import LARGE, MOST_ROWS, times_rows_of
from kernels_pallas.unembed_stats.xla import matmul

I, O = 80, LARGE // 80 + 1  # noqa: E741
WAYS = [matmul, functools.partial(product, axis=1)]


def plain(rows, w):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(rows, w, dims, preferred_element_type=jnp.float32)


def compiled(multiply, M, dtype):
    rows, w = jnp.ones((M, I), dtype), jnp.ones((O, I), dtype)
    return jax.jit(multiply).lower(rows, w).compile().as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_are_what_they_are_among_others(dtype):
    rng = np.random.default_rng(0)
    rows, w = (jnp.asarray(rng.normal(size=(n, I)), dtype) for n in (MOST_ROWS + 1, O))
    expected = np.asarray(rows, np.float64) @ np.asarray(w, np.float64).T
    for M in (1, 2, 5, 8, 9, 25, MOST_ROWS, MOST_ROWS + 1):
        found = jax.jit(times_rows_of, static_argnames="dtype")(rows[:M], w, dtype="float32")
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected[:M], rtol=1e-4, atol=1e-4)
    multiply = jax.jit(functools.partial(product, axis=1))
    np.testing.assert_allclose(
        multiply(rows[:1], w=w).astype(np.float32), multiply(rows[:3], w=w)[:1].astype(np.float32),
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("multiply", WAYS)
def test_cpus_multiply_few_rows_by_the_matrix(multiply):
    """The matrix is the first factor, which XLA does not copy: what comes out is [96, M]."""
    for M, width in ((2, 2), (4, 4), (5, 8), (9, 16), (24, 24), (25, 32), (MOST_ROWS, MOST_ROWS)):
        assert f"f32[{O},{width}]" in compiled(multiply, M, "float32")
        assert f"f32[{O},{width}]" not in compiled(plain, M, "float32")
        small = jax.jit(multiply).lower(jnp.ones((M, I)), jnp.ones((O - 1, I))).compile().as_text()
        assert f"f32[{O - 1},{width}]" not in small
    assert f"f32[{O},{MOST_ROWS + 1}]" not in compiled(multiply, MOST_ROWS + 1, "float32")


@pytest.mark.parametrize("multiply", WAYS)
def test_cpus_make_no_wider_copy(multiply):
    widens = lambda f, M: f"f32[{O},{I}]" in compiled(f, M, "bfloat16")
    if widens(plain, 2):
        pytest.skip("this CPU does not multiply bfloat16")
    assert not widens(multiply, 1)
    assert widens(plain, 1)  # else a single row need not be two any more
    row, w = jnp.ones((1, I), jnp.bfloat16), jnp.ones((O, I), jnp.bfloat16)
    np.testing.assert_array_equal(times_rows_of(row, w, jnp.float32), np.full((1, O), I))
