"""An order drawn at random."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Confidence, Round, Stream, draw_uniform


@struct.dataclass
class Random(Confidence):
    """Uniform in (0, 1), drawn anew each round (LLaDA `random`).

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992.
    """

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        uniform = draw_uniform(view.noise_key, Stream.RANDOM)
        return view.replace(confidence=jnp.log(uniform)), state
