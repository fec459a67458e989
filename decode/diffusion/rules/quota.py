"""A fixed number of commits per step: LLaDA's schedule."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, check_range
from decode.diffusion.round import Round, rank
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

    counts_rounds: ClassVar[bool] = True

    steps_per_block: jax.Array | int = 32

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps_per_block", self.steps_per_block, 1, float("inf"))

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        steps = jnp.asarray(self.steps_per_block, jnp.int32)
        quota = round.num_open // steps + (round.block_step < round.num_open % steps)
        return rank(round.confidence, round.eligible) < quota[:, None], state
