"""The gated MLP.

Letters: B batch, T window positions, D width.
"""

from __future__ import annotations

import jax

from dlm.blocks.linear import linear
from dlm.params import Params


def mlp(x: jax.Array, p: Params) -> jax.Array:
    """The gated MLP of `p` {"gate", "up", "down"} on x [B, T, D]."""
    return linear(jax.nn.silu(linear(x, p["gate"])) * linear(x, p["up"]), p["down"])
