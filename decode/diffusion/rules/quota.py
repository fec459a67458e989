"""A fixed number of commits per step: LLaDA's schedule."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Round, check_range, rank
from dlm.config import ModelConfig


@struct.dataclass
class Quota(CommitRule):
    """Spreads a block's masks evenly over a number of steps, the surest positions first.

    With n masks when the block opens and S steps, step s commits n // S positions, one more if
    s < n mod S. Steps per block as large as the block: one token per step.

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992, Alg. 5
    (`get_num_transfer_tokens` of the public code).

    Attributes:
      steps_per_block: S >= 1. The paper's `steps` is this times the number of blocks.
    """

    steps_per_block: jax.Array | int = 32

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps_per_block", self.steps_per_block, 1, float("inf"))

    def commit(self, view: Round, state: Any) -> tuple[jax.Array, Any]:
        steps = jnp.asarray(self.steps_per_block, jnp.int32)
        quota = view.num_open // steps + (view.block_step < view.num_open % steps)
        return rank(view.confidence, view.eligible) < quota[:, None], state
