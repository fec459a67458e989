"""Noise where nothing is decided.

Letters: B rows, W window positions, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.streams import Stream, draw_bits
from decode.diffusion.contracts import Inputs, check_range
from decode.diffusion.round import Frame, Round
from dlm.config import ModelConfig


@struct.dataclass
class UniformNoise(Inputs):
    """A token drawn uniformly, anew in every round: for models trained on noise, not on MASK.

    Reference: the uniform-noise sampler of DiffusionGemma (Google, 2026); Austin et al.,
    "Structured Denoising Diffusion Models in Discrete State-Spaces", arXiv:2107.03006, section 3.1.

    Attributes:
      self_condition: in [0, 1], weight of the embedding expected in the round before, mixed into
        all positions of the block. 0: none.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"expected"})
    shows_mask: ClassVar[bool] = False
    remembers: ClassVar[bool] = True

    self_condition: jax.Array | float = 0.0

    def validate(self, cfg: ModelConfig) -> None:
        check_range("self_condition", self.self_condition, 0, 1)

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W, D] float32: what was expected."""
        return jnp.zeros((batch_size, window_len, cfg.d_model), jnp.float32)

    def see(
        self, cfg: ModelConfig, tokens: jax.Array, undecided: jax.Array, noise_key: jax.Array
    ) -> jax.Array:
        bits = draw_bits(noise_key, Stream.NOISE)
        noise = (bits % jnp.uint32(cfg.vocab_size)).astype(jnp.int32)
        return jnp.where(undecided, noise, tokens)

    def mix(self, frame: Frame, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = frame.in_block & (frame.block_step > 0)[:, None]
        return jnp.where(known, self.self_condition, 0.0), state

    def remember(self, round: Round, state: Any) -> jax.Array:
        assert round.expected is not None
        return round.expected
