"""Products with weights, which may have a low-rank change beside them.

Letters: B batch, T window positions, D width, H head width, M rows, I and O widths in and out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dlm.params import Apart, LowRank, OfLayer
from kernels_pallas.few_rows import times_rows_of

Weight = jax.Array | LowRank | OfLayer


def to_heads(x: jax.Array, w: Weight) -> jax.Array:
    """x [B, T, D] times w [heads, H, D]: [B, T, heads, H]."""
    rows = x.reshape(-1, x.shape[-1])

    def times(weight: jax.Array) -> jax.Array:
        flat = weight.reshape(-1, weight.shape[-1])
        return product(rows, flat, 1)

    return _product(x, w, times).reshape(*x.shape[:2], *w.shape[:2])


def linear(x: jax.Array, w: Weight, num_in: int = 1) -> jax.Array:
    """x [B, T, *in] times w [*in, *out], as one two-dimensional product.

    Products of more dimensions are several times slower in the backward pass on CPU.
    """
    B, T = x.shape[:2]
    rows = x.reshape(B * T, -1)
    is_turned = isinstance(w, OfLayer) and isinstance(w.stack, Apart) and w.stack.is_turned

    def times(weight: jax.Array) -> jax.Array:
        if is_turned:  # [out, *in]
            return product(rows, weight.reshape(-1, rows.shape[1]), 1)
        return product(rows, weight.reshape(rows.shape[1], -1), 0)

    out = _product(x, w, times)
    return out.reshape(B, T, *w.shape[num_in:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(rows: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """rows [M, I] times w, [I, O] (axis 0) or [O, I] (axis 1): [M, O] of their type.

    CPUs multiply bfloat16 as such, twice as fast as float32, if they are asked for sums in float32;
    else they widen it first. Both products of the backward pass are asked for in the same way.
    """
    return _rounded(rows, w, (1, axis))


def _rounded(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    dims = (((axes[0],), (axes[1],)), ((), ()))

    def over(a: jax.Array, b: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        if axes == (1, 1):
            return times_rows_of(a, b, dtype)
        return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)

    if a.dtype != jnp.bfloat16:
        return over(a, b)

    def on_cpu(a: jax.Array, b: jax.Array) -> jax.Array:
        return over(a, b, jnp.float32).astype(a.dtype)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=over)


def _forward(rows: jax.Array, w: jax.Array, axis: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _rounded(rows, w, (1, axis)), (rows, w)


def _backward(
    axis: int, kept: tuple[jax.Array, jax.Array], by_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rows, w = kept
    by_w = (rows, by_out) if axis == 0 else (by_out, rows)
    return _rounded(by_out, w, (1, 1 - axis)), _rounded(*by_w, (0, 0))


product.defvjp(_forward, _backward)


def _product(x: jax.Array, w: Weight | Apart, times: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`times` of a weight, and what its change adds to it.

    Of those that lie apart, each layer's product is a branch of its own.
    """
    if isinstance(w, OfLayer):
        assert isinstance(w.stack, Apart)
        branches = [functools.partial(_product, x, layer, times) for layer in w.stack.layers]
        return jax.lax.switch(w.layer, branches)
    assert not isinstance(w, Apart)  # `forward` says which layer of it
    return times(w.weight) + low_rank(x, w) if isinstance(w, LowRank) else times(w)


def low_rank(x: jax.Array, w: LowRank) -> jax.Array:
    """What the change of a weight adds to the product of x [B, T, *in]: [B * T, O].

    It is zero, and not computed, at positions before `w.first`: what is added to them changes no
    bit of theirs.
    """
    B, T = x.shape[:2]
    rows = x[:, w.first :].reshape(B * (T - w.first), -1)
    change = product(product(rows, w.down, 0), w.up, 0) * w.scale
    at_all = jnp.pad(change.reshape(B, T - w.first, -1), ((0, 0), (w.first, 0), (0, 0)))
    return at_all.reshape(B * T, -1)
