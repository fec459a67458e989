"""Stop early once the answer has converged, and fill in the rest at once."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import Stopper, check_range
from decode.diffusion.round import Round
from dlm.config import ModelConfig


@struct.dataclass
class Prophet(Stopper):
    """Fills everything when the answer's logits lead by enough, the later the less.

    The gap between best and second-best logit, averaged over the answer region, is compared with a
    threshold that falls with the share of steps done. Thresholds are in logit units, so they do not
    carry over from model to model.

    Reference: Li et al., "Diffusion Language Models Know the Answer Before Decoding" (Prophet),
    arXiv:2508.19982, section 3.

    Attributes:
      answer_start: >= 0, first completion position of the answer region.
      answer_len: >= 1, its positions, clipped to the completion (5).
      total_steps: T_max >= 1, against which progress is measured; None: one per position.
      early, mid, late: any number, thresholds for progress below 0.33, below 0.67, and beyond.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"canvas"})

    answer_start: jax.Array | int
    answer_len: jax.Array | int = 5
    total_steps: jax.Array | int | None = None
    early: jax.Array | float = 7.5
    mid: jax.Array | float = 5.0
    late: jax.Array | float = 2.5

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        return cls(0, answer_len=4)

    def validate(self, cfg: ModelConfig) -> None:
        check_range("answer_start", self.answer_start, 0, cfg.max_seq_len)
        check_range("answer_len", self.answer_len, 1, float("inf"))
        if self.total_steps is not None:
            check_range("total_steps", self.total_steps, 1, float("inf"))
        for name in ("early", "mid", "late"):
            if np.isnan(float(getattr(self, name))):
                raise ValueError(f"{name}=nan must be a number")

    def fill(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        place = round.index - self.answer_start
        answer = (place >= 0) & (place < self.answer_len) & (round.index < round.gen_len[:, None])
        gap = round.stats.log_prob - round.stats.second_log_prob
        count = answer.sum(axis=-1)
        mean = jnp.where(answer, gap, 0.0).sum(axis=-1) / jnp.maximum(count, 1)
        total = round.gen_len if self.total_steps is None else jnp.asarray(self.total_steps)
        progress = (round.row_step + 1).astype(jnp.float32) / total.astype(jnp.float32)
        bar = jnp.where(progress < 0.67, self.mid, self.late)
        bar = jnp.where(progress < 0.33, self.early, bar)
        return (mean >= bar) & (count > 0), state
