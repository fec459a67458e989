"""MASK that remembers what was expected in the round before.

Letters: B rows, W window positions, D model width.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Inputs, Points, check_range
from decode.diffusion.round import Frame, Round
from dlm.config import ModelConfig


@struct.dataclass
class Smoothing(Inputs):
    """MASK mixed with what the model expected there in the round before.

    The weight starts at `start` in the second round of a block and grows by `growth` per round up
    to `limit`.

    Reference: Ma et al., "dInfer: An Efficient Inference Framework for Diffusion Language Models",
    arXiv:2510.08666, iteration smoothing. There the commit threshold also falls, by 0.02 per step.

    Attributes:
      start: in [0, 1] (0.15).
      growth: in [0, 1], per round (0.02).
      limit: in [0, 1] (0.3).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"expected"})
    remembers: ClassVar[bool] = True

    start: jax.Array | float = 0.15
    growth: jax.Array | float = 0.02
    limit: jax.Array | float = 0.3

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"smoothing": {"inputs": cls()}}

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        check_range("start", self.start, 0, 1)
        check_range("growth", self.growth, 0, 1)
        check_range("limit", self.limit, 0, 1)

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W, D] float32: what was expected."""
        return jnp.zeros((batch_size, window_len, cfg.d_model), jnp.float32)

    def mix(self, frame: Frame, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        rounds = (frame.block_step - 1).astype(jnp.float32)
        weight = jnp.minimum(self.start + self.growth * rounds, self.limit)
        weight = jnp.where(frame.block_step > 0, weight, 0.0)  # nothing is known of a new block
        return jnp.where(frame.eligible, weight[:, None], 0.0), state

    def remember(self, round: Round, state: jax.Array) -> jax.Array:
        assert round.expected is not None
        return round.expected
