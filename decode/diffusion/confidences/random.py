"""An order drawn at random."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from decode.core.streams import Stream, draw_uniform
from decode.diffusion.contracts import Confidence
from decode.diffusion.round import Round


@struct.dataclass
class Random(Confidence):
    """Uniform in (0, 1), drawn anew each round (LLaDA `random`).

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992.
    """

    short_name: ClassVar[str] = "random"

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        uniform = draw_uniform(round.noise_key, Stream.RANDOM)
        return round.replace(confidence=jnp.log(uniform)), state
