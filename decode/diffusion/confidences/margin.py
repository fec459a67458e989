"""How far the best token is ahead of the second best."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Confidence
from decode.diffusion.round import Round


@struct.dataclass
class Margin(Confidence):
    """Probability of the best token minus that of the second best (Dream `topk_margin`).

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487.
    """

    short_name: ClassVar[str] = "margin"

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        gap = round.stats.second_log_prob - round.stats.log_prob  # <= 0
        margin = round.stats.log_prob + jnp.log(-jnp.expm1(gap))
        return round.replace(confidence=margin), state
