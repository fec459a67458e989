"""The MLP, gated or plain.

Letters: B batch, T window positions, D width, F hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from dlm.blocks.linear import linear
from dlm.params import Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def mlp(x: jax.Array, p: Params, activation: str = "silu") -> jax.Array:
    """The MLP of `p` on x [B, T, D].

    Args:
      x: see above.
      p: {"up", "down"}; with "gate" it is gated, with "up_bias" and the like it has biases.
      activation: a name in `ACTIVATIONS`.
    """
    act = ACTIVATIONS[activation]
    up = _affine(x, p, "up")
    hidden = act(_affine(x, p, "gate")) * up if "gate" in p else act(up)
    return _affine(hidden, p, "down")


def _affine(x: jax.Array, p: Params, name: str) -> jax.Array:
    product = linear(x, p[name])
    bias = p.get(f"{name}_bias")
    return product if bias is None else product + bias[None, None]
