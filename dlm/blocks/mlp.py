"""The MLP, gated or plain.

Letters: B batch, T window positions, D width, F hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

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
      p: {"up", "down"}; with "gate", or with "gate_up" for both (see `dlm.params.JOINED`), it is
        gated, with "up_bias" and the like it has biases.
      activation: a name in `ACTIVATIONS`.
    """
    act = ACTIVATIONS[activation]
    if "gate_up" in p:
        gate, up = jnp.split(linear(x, p["gate_up"]), 2, axis=-1)
        hidden = act(_biased(gate, p, "gate")) * _biased(up, p, "up")
    elif "gate" in p:
        up = _biased(linear(x, p["up"]), p, "up")
        hidden = act(_biased(linear(x, p["gate"]), p, "gate")) * up
    else:
        hidden = act(_biased(linear(x, p["up"]), p, "up"))
    return _biased(linear(hidden, p["down"]), p, "down")


def _biased(product: jax.Array, p: Params, name: str) -> jax.Array:
    bias = p.get(f"{name}_bias")
    return product if bias is None else product + bias[None, None]
