"""How little a position's distribution is spread."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import struct

from decode.diffusion.contracts import Confidence
from decode.diffusion.round import Round


@struct.dataclass
class NegEntropy(Confidence):
    """Minus the entropy in nats (Dream `entropy`).

    On the log scale this is the inverse perplexity exp(-entropy): `Threshold(0.9)` then means that
    the model hesitates between at most 1 / 0.9 tokens.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487.
    """

    short_name: ClassVar[str] = "neg_entropy"

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        return round.replace(confidence=-round.stats.entropy), state
