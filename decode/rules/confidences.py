"""How sure the model is of a proposal: four measures, all on the log scale.

Reference: Nie et al., arXiv:2502.09992 (low-confidence and random remasking); Ye et al.,
"Dream 7B", arXiv:2508.15487 (margin, entropy).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from decode.rules.contracts import Confidence, Round, Stream, draw_uniform


@struct.dataclass
class Probability(Confidence):
    """The proposal's probability, without temperature (LLaDA `low_confidence`)."""

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        return view.replace(confidence=view.log_prob), state


@struct.dataclass
class Margin(Confidence):
    """Probability of the best token minus that of the second best (Dream `topk_margin`)."""

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        gap = view.stats.second_log_prob - view.stats.log_prob  # <= 0
        margin = view.stats.log_prob + jnp.log(-jnp.expm1(gap))
        return view.replace(confidence=margin), state


@struct.dataclass
class NegEntropy(Confidence):
    """Minus the entropy in nats (Dream `entropy`).

    On the log scale this is the inverse perplexity exp(-entropy): `Threshold(0.9)` then means that
    the model hesitates between at most 1 / 0.9 tokens.
    """

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        return view.replace(confidence=-view.stats.entropy), state


@struct.dataclass
class Random(Confidence):
    """Uniform in (0, 1), drawn anew each round (LLaDA `random`)."""

    def measure(self, view: Round, state: Any) -> tuple[Round, Any]:
        uniform = draw_uniform(view.noise_key, Stream.RANDOM)
        return view.replace(confidence=jnp.log(uniform)), state
