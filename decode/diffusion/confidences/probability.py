"""The proposal's probability."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import struct

from decode.diffusion.contracts import Confidence
from decode.diffusion.round import Round


@struct.dataclass
class Probability(Confidence):
    """The proposal's probability, without temperature (LLaDA `low_confidence`).

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992.
    """

    short_name: ClassVar[str] = "probability"

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        return round.replace(confidence=round.log_prob), state
