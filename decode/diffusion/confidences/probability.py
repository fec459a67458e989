"""The proposal's probability."""

from __future__ import annotations

from typing import Any

from flax import struct

from decode.diffusion.contracts import Confidence, Round


@struct.dataclass
class Probability(Confidence):
    """The proposal's probability, without temperature (LLaDA `low_confidence`).

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992.
    """

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        return view.replace(confidence=view.log_prob), state
