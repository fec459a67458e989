"""A lower bar near positions the model is already sure of."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, log_confidence
from dlm.config import ModelConfig


@struct.dataclass
class LocalLeap(CommitRule):
    """Threshold decoding whose threshold is lower within `radius` of an anchor.

    Anchors are eligible positions that pass `threshold` in this very round; committed tokens are
    none. Distance is counted over canvas positions. A radius of 0, or `relaxed` = `threshold`, is
    plain threshold decoding.

    Reference: Kong et al., "Accelerating Diffusion LLM Inference via Local Determinism
    Propagation", arXiv:2510.07081.

    Attributes:
      threshold: in [0, 1]; the bar everywhere, and what makes an anchor (tau_a, 0.9 there).
      relaxed: in [0, threshold]; the bar near an anchor (tau_r, 0.75 there).
      radius: >= 0, positions to either side of an anchor (W, 4 there).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    threshold: jax.Array | float = 0.9
    relaxed: jax.Array | float = 0.75
    radius: jax.Array | int = 4

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "local_leap": {"rule": cls(0.9, relaxed=0.75)},
            "local_leap_0.5": {"rule": cls(0.9, relaxed=0.5)},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_range("relaxed", self.relaxed, 0, float(self.threshold), " (the threshold)")
        check_range("radius", self.radius, 0, float("inf"))

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        is_anchor = round.eligible & (round.confidence >= log_confidence(self.threshold))
        position = jnp.arange(is_anchor.shape[-1])
        is_near = jnp.abs(position[:, None] - position[None]) <= self.radius  # [W, W]
        near_anchor = (is_anchor[:, None] & is_near[None]).any(axis=-1)
        passes = round.confidence >= log_confidence(self.relaxed)
        return is_anchor | (round.eligible & near_anchor & passes), state
