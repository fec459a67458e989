"""Ends of the text are decided last: without it, one-block decoding ends texts too early."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import Confidence, Points, check_range
from decode.diffusion.round import Round
from dlm.config import ModelConfig


@struct.dataclass
class EndsLast(Confidence):
    """Probability among the tokens that do not end the text; proposals that do come last.

    A model that was trained on answers padded with end-of-text is sure of ends far behind the
    answer, before it knows the answer. Here their positions are decided when nothing else is left,
    and the others are compared as if no text ended.

    Reference: Nie et al., "Large Language Diffusion Models", arXiv:2502.09992: how the published
    scores of LLaDA-8B-Instruct were made (`confidence_eos_eot_inf` of the public code, as it works
    at temperature 0; at others that one leaves end-of-text in, and lets the end of a turn out).

    Attributes:
      ids: [n] int32 or a sequence of ints. The ends; None: all of the model's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"given"})

    ids: jax.Array | tuple[int, ...] | None = None

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"ends_last": {"confidence": cls()}}

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        return cls(cfg.eos_ids)

    def validate(self, cfg: ModelConfig) -> None:
        ids = [] if self.ids is None else np.asarray(self.ids, np.int64).tolist()
        for i in ids:
            check_range("an end in ids", i, 0, cfg.vocab_size - 1)
        if len(set(ids)) < len(ids):
            raise ValueError(f"ids={ids} must be different tokens")

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W, n] int32: the ends."""
        ids = cfg.eos_ids if self.ids is None else self.ids
        ids = jnp.asarray(ids, jnp.int32).reshape(1, 1, -1)
        return jnp.broadcast_to(ids, (batch_size, window_len, ids.shape[-1]))

    def given_ids(self, state: jax.Array) -> jax.Array:
        return state

    def measure(self, round: Round, state: jax.Array) -> tuple[Round, Any]:
        assert round.stats.given_log_probs is not None
        is_end = (round.proposal[..., None] == state).any(axis=-1)
        ends = jnp.exp(round.stats.given_log_probs).sum(axis=-1)
        among = jnp.minimum(round.log_prob - jnp.log1p(-jnp.minimum(ends, 1 - 1e-6)), 0.0)
        return round.replace(confidence=jnp.where(is_end, -jnp.inf, among)), state
