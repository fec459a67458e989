"""The best position of every gap, so that gaps are halved instead of nibbled at."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, log_confidence
from dlm.config import ModelConfig


@struct.dataclass
class Hierarchical(CommitRule):
    """Commits what passes `threshold`, and the surest position of every run of undecided ones.

    A run's best must pass the lower bar `low_threshold`. Both comparisons are strict. Equally sure
    positions of a run are all its best.

    Reference: Ma et al., "dInfer: An Efficient Inference Framework for Diffusion Language Models",
    arXiv:2510.08666, hierarchical decoding.

    Attributes:
      threshold: in [0, 1].
      low_threshold: in [0, threshold]; 0.4 to 0.62 there.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    threshold: jax.Array | float = 0.9
    low_threshold: jax.Array | float = 0.4

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "hierarchical_0.62": {"rule": cls(0.9, low_threshold=0.62)},
            "hierarchical": {"rule": cls(0.9, low_threshold=0.4)},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_range("low_threshold", self.low_threshold, 0, float(self.threshold), " (threshold)")

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        E = round.eligible
        before = jnp.pad(E, ((0, 0), (1, 0)))[:, :-1]
        run = jnp.cumsum((E & ~before).astype(jnp.int32), axis=-1)  # 1, 1, 2, 2, 2, ... where E
        same_run = (run[:, :, None] == run[:, None]) & E[:, None]  # [B, W, W]
        confidence = jnp.where(E, round.confidence, -jnp.inf)
        best = jnp.where(same_run, confidence[:, None], -jnp.inf).max(axis=-1)  # [B, W]
        is_best = E & (confidence == best) & (confidence > log_confidence(self.low_threshold))
        return is_best | (E & (confidence > log_confidence(self.threshold))), state
