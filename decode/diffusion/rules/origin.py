"""Discrete diffusion as it is defined: every position is decided at its own random time."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from decode.core.streams import Stream, draw_uniform
from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round
from decode.diffusion.rules.reverse_process import decided_share
from dlm.config import ModelConfig


@struct.dataclass
class Origin(CommitRule):
    """Commits each position with probability 1 - t_{i+1} / t_i at step i, all at the last step.

    Times run linearly from 1 to eps in `steps` steps. Positions are independent, and confidences
    play no part: this is ancestral sampling of the reverse process. Steps that commit nothing are
    part of it. `may_idle=False` makes them commit the surest position, which saves forwards but is
    no longer that process.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487, `diffusion_generate` of the public code
    (alg = origin, its default; pair with one block and a temperature).

    Attributes:
      steps: number of steps per block, >= 1.
      eps: the last time, in (0, 1).
      may_idle: whether steps may commit nothing, as in the public code.
    """

    steps: jax.Array | int = 256
    eps: jax.Array | float = 1e-3
    may_idle: bool = struct.field(pytree_node=False, default=True)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"dream_origin": {"rule": cls(block_len)}}

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"idle"} if self.may_idle else ())

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps", self.steps, 1, float("inf"))
        check_range("eps", self.eps, 0, 1, ends="()")

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        uniform = draw_uniform(round.noise_key, Stream.ORIGIN)
        share = decided_share(round.block_step, self.steps, self.eps)
        return round.eligible & (uniform < share[:, None]), state
