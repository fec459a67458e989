"""How far the best token is ahead of the second best."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Confidence, Round


@struct.dataclass
class Margin(Confidence):
    """Probability of the best token minus that of the second best (Dream `topk_margin`).

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487.
    """

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        gap = view.stats.second_log_prob - view.stats.log_prob  # <= 0
        margin = view.stats.log_prob + jnp.log(-jnp.expm1(gap))
        return view.replace(confidence=margin), state
