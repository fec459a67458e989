"""A fixed number of commits per step of a whole block, and all that is sure: block diffusion."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, check_range
from decode.diffusion.round import Round, log_confidence, rank
from dlm.config import ModelConfig


@struct.dataclass
class BlockQuota(CommitRule):
    """Commits the surest of a block that its schedule asks for, or all above a threshold if more.

    With blocks of C positions and S steps, step s asks for C // S positions, one more if
    s < C mod S. What a schedule asks for does not depend on how much is masked: a block that begins
    inside the prompt takes fewer steps. C = S asks for one position per step.

        BlockQuota(C, S)         "static": the schedule
        BlockQuota(C, S, 0.9)    "dynamic": what is surer than 0.9, and no less than the schedule
        BlockQuota(n, 1, 0.9)    what is surer than 0.9, and no fewer than n positions

    With the confidence `LeftToRight` the first is the "sequential" schedule.

    Deviation: where fewer masks are left than asked for, they are all; one public sampler then goes
    on to overwrite decided tokens.

    Reference: Cheng et al., "SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable
    Sequence Generation", arXiv:2510.06303 (`remasking_strategy` of the public code); Bie et al.,
    "LLaDA2.0: Scaling Up Diffusion Language Models to 100B", arXiv:2512.15745.

    Attributes:
      block_len: C >= 1.
      steps: S >= 1.
      threshold: in [0, 1], strict; None: the schedule alone.
    """

    counts_rounds: ClassVar[bool] = True

    block_len: jax.Array | int = 32
    steps: jax.Array | int = 32
    threshold: jax.Array | float | None = None

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset(() if self.threshold is None else {"values"})

    def validate(self, cfg: ModelConfig) -> None:
        check_range("block_len", self.block_len, 1, float("inf"))
        check_range("steps", self.steps, 1, float("inf"))
        if self.threshold is not None:
            check_range("threshold", self.threshold, 0, 1)

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        length, steps = jnp.asarray(self.block_len, jnp.int32), jnp.asarray(self.steps, jnp.int32)
        quota = length // steps + (round.block_step < length % steps)
        commit = rank(round.confidence, round.eligible) < quota[:, None]
        if self.threshold is not None:
            commit |= round.confidence > log_confidence(self.threshold)
        return commit & round.eligible, state
