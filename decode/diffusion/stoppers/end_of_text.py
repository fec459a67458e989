"""When a row is done."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Stopper
from decode.diffusion.round import Progress, is_any


@struct.dataclass
class Filled(Stopper):
    """Only when every position is decided, end-of-text tail and all (the published samplers)."""

    short_name: ClassVar[str] = "filled"


@struct.dataclass
class Eos(Stopper):
    """As soon as an end-of-text token is decided and so is everything before it.

    The text is the same as with `Filled`: what comes after the first end-of-text is cut anyway, and
    decided tokens never change (without a reviser).
    """

    short_name: ClassVar[str] = "eos"

    def should_stop(self, progress: Progress, end_ids: jax.Array) -> jax.Array:
        settled = jnp.cumprod(progress.decided.astype(jnp.int32), axis=-1).astype(bool)
        return (settled & is_any(progress.completion, end_ids)).any(axis=-1)


@struct.dataclass
class EosBlock(Stopper):
    """When a block is complete and holds an end-of-text token (Fast-dLLM, LocalLeap).

    Unlike `Eos` it lets a reviser finish its work on the block.
    """

    short_name: ClassVar[str] = "eos_block"

    def should_stop(self, progress: Progress, end_ids: jax.Array) -> jax.Array:
        before = jnp.arange(progress.decided.shape[1])[None] < progress.block_end[:, None]
        is_eos = progress.decided & is_any(progress.completion, end_ids)
        return progress.is_full & (is_eos & before).any(axis=-1)
