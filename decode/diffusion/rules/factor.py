"""Commit as many as the confidences allow jointly."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, rank, sort_confidence
from dlm.config import ModelConfig


@struct.dataclass
class Factor(CommitRule):
    """Commits the n surest positions for the largest n that all of them bear.

    With confidences c_1 >= c_2 >= ..., grows n while (n + 1) (1 - c_n) <= factor; the first
    position always passes. If n tokens each have probability above 1 - e and (n + 1) e <= 1, the
    product of their marginals and their joint distribution have the same arg-max.

    Reference: Wu et al., "Fast-dLLM", arXiv:2505.22618, Thm. 1 and Alg. 1 (factor variant).

    Attributes:
      factor: f >= 0; larger is more aggressive (1.0 in the paper, studied up to 1.9).
      commit_last: bit-faithful to the public code, which commits all candidates when only the last
        one fails. Off by default: that position has failed the test.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    factor: jax.Array | float = 1.0
    commit_last: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "factor_0.5": {"rule": cls(0.5)},
            "factor": {"rule": cls(1.0)},
            "factor_1.9": {"rule": cls(1.9)},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("factor", self.factor, 0, float("inf"))

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        confidence = sort_confidence(round.confidence, round.eligible)
        n = jnp.arange(1, confidence.shape[-1] + 1)[None]
        bears = (n + 1) * -jnp.expm1(confidence) <= self.factor
        passed = jnp.cumprod((bears | (n == 1)).astype(jnp.int32), axis=-1).sum(axis=-1)
        if self.commit_last:
            candidates = round.eligible.sum(axis=-1)
            passed = jnp.where(passed == candidates - 1, candidates, passed)
        return round.eligible & (rank(round.confidence, round.eligible) < passed[:, None]), state
