"""When a row is done."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.rules.contracts import Stopper


@struct.dataclass
class Filled(Stopper):
    """Only when every position is decided, end-of-text tail and all (the published samplers)."""

    def should_stop(self, completion: jax.Array, decided: jax.Array, eos_id: int) -> jax.Array:
        return jnp.zeros(completion.shape[0], bool)


@struct.dataclass
class Eos(Stopper):
    """As soon as an end-of-text token is decided and so is everything before it.

    The text is the same as with `Filled`: what comes after the first end-of-text is cut anyway, and
    decided tokens never change (without a reviser).
    """

    def should_stop(self, completion: jax.Array, decided: jax.Array, eos_id: int) -> jax.Array:
        settled = jnp.cumprod(decided.astype(jnp.int32), axis=-1).astype(bool)
        return (settled & (completion == eos_id)).any(axis=-1)
