"""How little a position's distribution is spread."""

from __future__ import annotations

from typing import Any

from flax import struct

from decode.diffusion.contracts import Confidence, Round


@struct.dataclass
class NegEntropy(Confidence):
    """Minus the entropy in nats (Dream `entropy`).

    On the log scale this is the inverse perplexity exp(-entropy): `Threshold(0.9)` then means that
    the model hesitates between at most 1 / 0.9 tokens.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487.
    """

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        return view.replace(confidence=-view.stats.entropy), state
