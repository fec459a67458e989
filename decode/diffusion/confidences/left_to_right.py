"""From left to right, whatever the model says."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Confidence
from decode.diffusion.round import Round


@struct.dataclass
class LeftToRight(Confidence):
    """Falls by 1 per position of the block: the leftmost masks come first (SDAR `sequential`).

    Reference: Cheng et al., "SDAR", arXiv:2510.06303, `remasking_strategy` of the public code.
    """

    short_name: ClassVar[str] = "left_to_right"
    only_orders: ClassVar[bool] = True

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        place = round.index - round.block_start[:, None]
        return round.replace(confidence=-jnp.maximum(place, 0).astype(jnp.float32)), state
