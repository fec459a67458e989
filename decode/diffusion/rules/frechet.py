"""Commit the longest profile of confidences that still beats its strongest competitor."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, rank, sort_confidence
from dlm.config import ModelConfig


@struct.dataclass
class Frechet(CommitRule):
    """Commits the n surest positions while the bounds of their joint probability stay apart.

    Of confidences c_1 >= c_2 >= ..., whatever the dependence between positions,

        L_n = sum_{j <= n} c_j - (n - 1)    bounds the probability that all n are right from below
        U_n = 1 - c_n                       bounds that of any competitor from above

    and the largest n with L_n - U_n > margin is committed: with margin 0 the proposals are then the
    joint arg-max. With all confidences equal this is `Factor(1 - margin)`, which looks at the
    weakest member only; mixed profiles commit more here. At margin 1 it is one token per step.

    Reference: Kasa, Dai, Negi and Li, "Fast-dLLM++: Fréchet Profile Decoding for Faster Diffusion
    LLM Inference", arXiv:2606.02955.

    Attributes:
      margin: delta >= 0, strict (0.25; 0.02 to 0.3 by task).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    margin: jax.Array | float = 0.25

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"frechet": {"rule": cls(0.25)}, "frechet_0.05": {"rule": cls(0.05)}}

    def validate(self, cfg: ModelConfig) -> None:
        check_range("margin", self.margin, 0, float("inf"))

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        doubt = -jnp.expm1(sort_confidence(round.confidence, round.eligible))  # 1 - c, rising
        passes = jnp.cumsum(doubt, axis=-1) + doubt < 1 - jnp.asarray(self.margin)
        num = passes.sum(axis=-1, keepdims=True)  # the left side never falls: a prefix
        return round.eligible & (rank(round.confidence, round.eligible) < num), state
