"""What the model sees at undecided positions: MASK, MASK that remembers, or noise."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.rules.contracts import Inputs, Round, Stream, check_range, draw_bits
from dlm.config import ModelConfig


@struct.dataclass
class MaskInputs(Inputs):
    """The model's MASK token."""

    def validate(self, cfg: ModelConfig) -> None:
        if cfg.mask_token_id is None:
            raise ValueError(
                "mask_token_id=None: masked diffusion needs a model with a MASK token; models "
                "trained on noise take inputs=UniformNoise()"
            )


@struct.dataclass
class Smoothing(Inputs):
    """MASK mixed with what the model expected there in the round before.

    The weight starts at `start` in the second round of a block and grows by `growth` per round up
    to `limit`.

    Reference: Ma et al., "dInfer: An Efficient Inference Framework for Diffusion Language Models",
    arXiv:2510.08666, iteration smoothing. There the commit threshold also falls, by 0.02 per step.

    Attributes:
      start: in [0, 1] (0.15).
      growth: per round (0.02).
      limit: in [0, 1] (0.3).
    """

    needs_logits: ClassVar[bool] = True
    needs_expected: ClassVar[bool] = True

    start: jax.Array | float = 0.15
    growth: jax.Array | float = 0.02
    limit: jax.Array | float = 0.3

    def validate(self, cfg: ModelConfig) -> None:
        MaskInputs().validate(cfg)
        check_range("start", self.start, 0, 1)
        check_range("growth", self.growth, 0, 1)
        check_range("limit", self.limit, 0, 1)

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W, D] float32: what was expected."""
        return jnp.zeros((batch_size, window_len, cfg.d_model), jnp.float32)

    def mix(self, view: Round, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        rounds = (view.block_step - 1).astype(jnp.float32)
        weight = jnp.minimum(self.start + self.growth * rounds, self.limit)
        weight = jnp.where(view.block_step > 0, weight, 0.0)  # nothing is known of a new block
        return jnp.where(view.eligible, weight[:, None], 0.0), state

    def remember(self, view: Round, state: jax.Array) -> jax.Array:
        assert view.expected is not None
        return view.expected


@struct.dataclass
class UniformNoise(Inputs):
    """A token drawn uniformly, anew in every round: for models trained on noise, not on MASK.

    Reference: the uniform-noise sampler of DiffusionGemma (Google, 2026); Austin et al.,
    "Structured Denoising Diffusion Models in Discrete State-Spaces", arXiv:2107.03006, section 3.1.

    Attributes:
      self_condition: in [0, 1], weight of the embedding expected in the round before, mixed into
        all positions of the block. 0: none.
    """

    needs_logits: ClassVar[bool] = True
    needs_expected: ClassVar[bool] = True

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

    def mix(self, view: Round, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        known = view.in_block & (view.block_step > 0)[:, None]
        return jnp.where(known, self.self_condition, 0.0), state

    def remember(self, view: Round, state: Any) -> jax.Array:
        assert view.expected is not None
        return view.expected
