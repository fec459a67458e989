"""Confidence that discounts what is far away, and tokens that come up everywhere."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import Confidence, check_range
from decode.diffusion.round import Round
from dlm.config import ModelConfig

_NEVER = 1e-9  # added to frequencies, as in the public code
_MOST = -float(np.log(_NEVER))  # what the content of a token that never comes up is at most


@struct.dataclass
class PcSampler(Confidence):
    """Weighs the probability of a proposal by its position and by how rare its token is.

    Ordering by probability alone jumps to both ends of the canvas, and to tokens that say nothing.
    With p the probability of proposal v at distance d from the start of the block, and b(v) the
    share of v in a reference corpus,

        content = min(alpha, -p ln(b(v) + 1e-9))      score = exp(-decay d) content

    What is reported is log(score / most), with `most` = min(alpha, -ln 1e-9) what a score can be.
    That is no probability and only orders positions: it goes with rules that rank. Published with
    one token per step and the whole canvas as one block, whose order `decay` shapes: 0 leaves it
    free, 1 is nearly left to right.

    Reference: Huang et al., "PC-Sampler: Position-Aware Calibration of Decoding Bias in Masked
    Diffusion Models", arXiv:2508.13021. Left out: the variant "linear".

    Attributes:
      background: [V] float32, b; of `scripts.token_frequencies`.
      decay: lambda >= 0 (0.25; 0.5 for structured tasks, 0 for Sudoku).
      alpha: > 0 (10).
    """

    only_orders: ClassVar[bool] = True

    background: jax.Array
    decay: jax.Array | float = 0.25
    alpha: jax.Array | float = 10.0

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        return cls(jnp.full(cfg.vocab_size, 1 / cfg.vocab_size))

    def validate(self, cfg: ModelConfig) -> None:
        check_range("decay", self.decay, 0, float("inf"))
        check_range("alpha", self.alpha, 0, float("inf"), ends="(]")
        if np.shape(self.background) != (cfg.vocab_size,):
            raise ValueError(
                f"background has shape {np.shape(self.background)} and must have one frequency "
                f"per token, [vocab_size={cfg.vocab_size}]: python -m scripts.token_frequencies"
            )

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        frequency = jnp.asarray(self.background, jnp.float32)[round.proposal]
        surprise = jnp.maximum(-jnp.log(frequency + _NEVER), _NEVER)
        alpha = jnp.asarray(self.alpha, jnp.float32)
        content = jnp.minimum(jnp.log(alpha), round.log_prob + jnp.log(surprise))
        distance = (round.index - round.block_start[:, None]).astype(jnp.float32)
        most = jnp.log(jnp.minimum(alpha, _MOST))
        return round.replace(confidence=content - self.decay * distance - most), state
