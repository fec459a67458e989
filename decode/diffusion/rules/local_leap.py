"""A lower bar near positions the model is already sure of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Round, check_range, log_confidence
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
      radius: positions to either side of an anchor (W, 4 there).
    """

    threshold: jax.Array | float = 0.9
    relaxed: jax.Array | float = 0.75
    radius: jax.Array | int = 4

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_range("relaxed", self.relaxed, 0, float(self.threshold), " (the threshold)")
        check_range("radius", self.radius, 0, float("inf"))

    def commit(self, view: Round, state: Any) -> tuple[jax.Array, Any]:
        is_anchor = view.eligible & (view.confidence >= log_confidence(self.threshold))
        position = jnp.arange(is_anchor.shape[-1])
        is_near = jnp.abs(position[:, None] - position[None]) <= self.radius  # [W, W]
        near_anchor = (is_anchor[:, None] & is_near[None]).any(axis=-1)
        passes = view.confidence >= log_confidence(self.relaxed)
        return is_anchor | (view.eligible & near_anchor & passes), state
