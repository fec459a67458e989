"""Commit what is sure and has stopped changing."""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, log_confidence
from dlm.config import ModelConfig


class History(struct.PyTreeNode):
    """What the rule remembers of a block.

    Attributes:
      log_p: [B, W, V] float32. Log-probabilities of the round before.
      stable: [B, W] int32. For how many rounds in a row the divergence has been small.
      was_open: [B, W] bool. Positions that were part of the block in the round before.
    """

    log_p: jax.Array
    stable: jax.Array
    was_open: jax.Array


@struct.dataclass
class Klass(CommitRule):
    """Commits eligible positions above `threshold` whose distribution has been stable.

    Stable: KL(p_t || p_{t-1}) < `max_kl` in each of the last `history` rounds of the block. A round
    in which nothing qualifies commits the surest position.

    Reference: Kim et al., "KLASS: KL-Guided Fast Inference in Masked Diffusion Models",
    arXiv:2511.05664, Alg. 1.

    Attributes:
      threshold: in [0, 1]; strict.
      max_kl: >= 0, in nats, strict (0.01).
      history: >= 0, rounds (2).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits", "values"})

    threshold: jax.Array | float = 0.9
    max_kl: jax.Array | float = 0.01
    history: jax.Array | int = 2

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "klass": {"rule": cls(0.9)},
            "klass_0.6": {"rule": cls(0.6)},
        }

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        return cls(0.2, max_kl=1.0)

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_range("max_kl", self.max_kl, 0, float("inf"), " nats")
        check_range("history", self.history, 0, float("inf"), " rounds")

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> History:
        shape = (batch_size, window_len)
        return History(
            jnp.zeros((*shape, cfg.vocab_size), jnp.float32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, bool),
        )

    def commit(self, round: Round, state: History) -> tuple[jax.Array, History]:
        assert round.logits is not None
        log_p = jax.nn.log_softmax(round.logits)
        p = jnp.exp(log_p)
        kl = jnp.where(p > 0, p * (log_p - state.log_p), 0.0).sum(axis=-1)
        was_open = state.was_open & (round.block_step > 0)[:, None]
        stable = jnp.where(was_open & (kl < self.max_kl), state.stable + 1, 0)
        is_sure = round.confidence > log_confidence(self.threshold)
        is_stable = stable >= self.history
        return round.eligible & is_sure & is_stable, History(log_p, stable, round.in_block)
