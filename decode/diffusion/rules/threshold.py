"""Commit everything the model is sure enough of."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
from flax import struct

from decode.diffusion.contracts import CommitRule, check_range
from decode.diffusion.round import Round, log_confidence
from dlm.config import ModelConfig


@struct.dataclass
class Threshold(CommitRule):
    """Commits every eligible position whose confidence is at least `threshold`.

    If there is none, the loop commits the surest one. At 1 this is one token per step; at 0 a block
    is one step.

    Reference: Wu et al., "Fast-dLLM", arXiv:2505.22618, Alg. 1.

    Attributes:
      threshold: in [0, 1]; the paper's tau, 0.9 there.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    threshold: jax.Array | float = 0.9

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        return round.eligible & (round.confidence >= log_confidence(self.threshold)), state
