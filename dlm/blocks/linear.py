"""Products with weights, which may have a low-rank change beside them.

Letters: B batch, T window positions, D width, H head width, M rows, I and O widths in and out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlm.params import Apart, LowRank, OfLayer

Weight = jax.Array | LowRank | OfLayer


def to_heads(x: jax.Array, w: Weight) -> jax.Array:
    """x [B, T, D] times w [heads, H, D]: [B, T, heads, H]."""
    rows = x.reshape(-1, x.shape[-1])
    weight, change = (w.weight, low_rank(rows, w)) if isinstance(w, LowRank) else (w, None)

    def times(weight: jax.Array) -> jax.Array:
        flat = weight.reshape(-1, weight.shape[-1])
        return jax.lax.dot_general(rows, flat, (((1,), (1,)), ((), ())))

    product = _where_it_lies(weight, times)
    product = product if change is None else product + change
    return product.reshape(*x.shape[:2], *weight.shape[:2])


def linear(x: jax.Array, w: Weight, num_in: int = 1) -> jax.Array:
    """x [B, T, *in] times w [*in, *out], as one two-dimensional product.

    Products of more dimensions are several times slower in the backward pass on CPU.
    """
    B, T = x.shape[:2]
    rows = x.reshape(B * T, -1)
    weight, change = (w.weight, low_rank(rows, w)) if isinstance(w, LowRank) else (w, None)
    product = _where_it_lies(weight, lambda w: jnp.dot(rows, w.reshape(rows.shape[1], -1)))
    product = product if change is None else product + change
    return product.reshape(B, T, *weight.shape[num_in:])


def _where_it_lies(
    weight: jax.Array | Apart | OfLayer, times: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`times` of a weight; of those that lie apart, each layer's product is a branch of its own."""
    if isinstance(weight, OfLayer):
        assert isinstance(weight.stack, Apart)
        branches = [functools.partial(times, layer) for layer in weight.stack.layers]
        return jax.lax.switch(weight.layer, branches)
    assert not isinstance(weight, Apart)  # `forward` says which layer of it
    return times(weight)


def low_rank(rows: jax.Array, w: LowRank) -> jax.Array:
    """What the change of a weight adds to the product of rows [M, I]: [M, O]."""
    return jnp.dot(jnp.dot(rows, w.down), w.up) * w.scale
