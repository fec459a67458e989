"""Products with weights: what they are, their gradients, and the types that CPUs multiply in."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.blocks.linear import linear, product, to_heads


def numbers(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_products_and_gradients_are_the_plain_ones(axis, dtype, atol):
    rows, w = numbers(0, 7, 5, dtype=dtype), numbers(1, *((5, 3) if axis == 0 else (3, 5)))
    wanted = numbers(2, 7, 3)

    def loss(times, rows, w):
        return (times(rows, w).astype(jnp.float32) * wanted).sum()

    ours = lambda rows, w: product(rows, w.astype(dtype), axis)
    plain = lambda rows, w: rows.astype(jnp.float32) @ (w if axis == 0 else w.T)
    assert ours(rows, w).dtype == dtype
    for ours_by, plain_by in zip(
        jax.grad(lambda *x: loss(ours, *x), (0, 1))(rows, w),
        jax.grad(lambda *x: loss(plain, *x), (0, 1))(rows, w),
        strict=True,
    ):
        assert ours_by.dtype == plain_by.dtype
        np.testing.assert_allclose(
            np.asarray(ours_by, np.float32), np.asarray(plain_by, np.float32), atol=atol
        )
    np.testing.assert_allclose(
        np.asarray(ours(rows, w), np.float32), np.asarray(plain(rows, w)), atol=atol
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about CPUs")
@pytest.mark.parametrize("times", [linear, to_heads])
def test_cpus_multiply_narrow_numbers_as_they_are(times):
    """Forward and backward: every product is of two bfloat16 operands, none of which is widened."""
    x = numbers(0, 2, 64, 32, dtype=jnp.bfloat16)
    w = numbers(1, *((32, 48) if times is linear else (6, 8, 32)), dtype=jnp.bfloat16)
    by_both = jax.grad(lambda x, w: times(x, w).astype(jnp.float32).sum(), (0, 1))
    for f, num in ((times, 1), (by_both, 2)):
        text = jax.jit(f).lower(x, w).as_text()
        found = re.findall(r"dot_general.*: \(tensor<\w+x(\w+)>, tensor<\w+x(\w+)>\)", text)
        assert found == [("bf16", "bf16")] * num
        assert len(re.findall(r"dot_general.*-> tensor<\w+xf32>", text)) == num
