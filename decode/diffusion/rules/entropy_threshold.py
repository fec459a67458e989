"""Commit every position whose distribution has low entropy."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, surest
from dlm.config import ModelConfig


@struct.dataclass
class EntropyThreshold(CommitRule):
    """Commits eligible positions with entropy at most `max_entropy`, and always the lowest one.

    Looks at the entropy whatever the method's confidence is.

    Reference: Chen et al., "dParallel", arXiv:2509.26488, decoding of the public code.

    Attributes:
      max_entropy: in nats, >= 0; 0.5 in the paper.
    """

    max_entropy: jax.Array | float = 0.5

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "entropy_threshold_0.2": {"rule": cls(0.2)},
            "entropy_threshold": {"rule": cls(0.5)},
            "entropy_threshold_1": {"rule": cls(1.0)},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("max_entropy", self.max_entropy, 0, float("inf"), " nats")

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        entropy = round.stats.entropy
        below = round.eligible & (entropy <= self.max_entropy)
        return below | surest(-entropy, round.eligible), state
