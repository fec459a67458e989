"""Trials: several ways on from one text, side by side, of which the beginning of one stays.

While nothing is tried, the first hypothesis is the text and the others wait. A strategy opens N
trials behind it, which grow in the same rounds until the last of them has ended; one that ended
before writes nothing more. Then the first hypothesis is that of the best trial, as far as it is
kept, and texts are as long as that.

Letters: B prompts, K hypotheses, w of them that were read, S slots, G completion positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.search.contracts import NEVER, Choice, Results, Round, Texts
from dlm.config import ModelConfig


class Trials(struct.PyTreeNode):
    """Those that are under way.

    Attributes:
      num: [B] int32. N; 1: there are none, the text is the first hypothesis.
      start: [B] int32. Tokens of the completion before them.
      num_tokens: [B, K] int32. What each has written.
      log_prob: [B, K] float32. Of that, together.
      has_ended: [B, K] bool.
    """

    num: jax.Array
    start: jax.Array
    num_tokens: jax.Array
    log_prob: jax.Array
    has_ended: jax.Array

    @classmethod
    def none(cls, B: int, K: int) -> Trials:
        """None of up to K."""
        return cls(
            num=jnp.ones(B, jnp.int32),
            start=jnp.zeros(B, jnp.int32),
            num_tokens=jnp.zeros((B, K), jnp.int32),
            log_prob=jnp.zeros((B, K)),
            has_ended=jnp.ones((B, K), bool),
        )

    @property
    def are_none(self) -> jax.Array:
        """[B] bool."""
        return self.num == 1

    def opened(self, num: jax.Array, start: jax.Array) -> Trials:
        """With `num` [B] of them behind `start` [B] tokens, where there are none.

        One alone is the text, which goes on.
        """
        new = self.are_none[:, None]
        beyond = jnp.arange(self.has_ended.shape[1])[None] >= num[:, None]
        return Trials(
            num=jnp.where(self.are_none, num, self.num),
            start=jnp.where(self.are_none, start, self.start),
            num_tokens=jnp.where(new, 0, self.num_tokens),
            log_prob=jnp.where(new, 0.0, self.log_prob),
            has_ended=jnp.where(new, beyond, self.has_ended),
        )

    def grown(self, is_written: jax.Array, log_prob: jax.Array, ends: jax.Array) -> Trials:
        """A round later: which write [B, K], tokens of such log-probabilities, and which end."""
        return self.replace(
            num_tokens=self.num_tokens + is_written,
            log_prob=self.log_prob + jnp.where(is_written, log_prob, 0.0),
            has_ended=self.has_ended | ends | self.are_none[:, None],
        )

    @property
    def mean(self) -> jax.Array:
        """[B, K] float32: log-probability per token; `NEVER` of what is no trial."""
        K = self.num_tokens.shape[1]
        is_one = jnp.arange(K)[None] < self.num[:, None]
        return jnp.where(is_one, self.log_prob / jnp.maximum(self.num_tokens, 1), NEVER)

    def first_of(self, texts: Texts) -> Results:
        """What is certain: the first hypothesis, before what is under way."""
        num_tokens = jnp.where(self.are_none, texts.num_tokens, self.start)
        return Results(
            tokens=texts.tokens[:, :1],
            log_prob=texts.log_prob[:, :1],
            num_tokens=num_tokens[:, None],
            score=texts.score[:, :1],
        )


def check_mask(name: str, mask: Any, cfg: ModelConfig) -> None:
    """Raises ValueError unless a mask of tokens is [V] bool."""
    if not isinstance(mask, jax.Array | np.ndarray) or mask.dtype != bool:
        raise ValueError(f"{name} is a {type(mask).__name__}, which must be an array of bool")
    if mask.shape != (cfg.vocab_size,):
        raise ValueError(f"{name} has shape {mask.shape}, not [vocab_size={cfg.vocab_size}]")


def of_read(x: jax.Array, K: int) -> jax.Array:
    """[B, K, ...] of what is said of the w hypotheses that were read, [B, w, ...]; or 0."""
    return jnp.pad(x, ((0, 0), (0, K - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def go_on(
    seen: Round,
    before: Trials,
    trials: Trials,
    *,
    is_written: jax.Array,
    token: jax.Array,
    log_prob: jax.Array,
    score: jax.Array,
    winner: jax.Array,
    num_kept: jax.Array,
    state: Any,
) -> Choice:
    """The hypotheses of the next round: all trials or, where all have ended, what is kept.

    Args:
      seen: the round.
      before: the trials before it.
      trials: those behind it.
      is_written: [B, K] bool. Which of them write.
      token: [B, K] int32. What they write.
      log_prob: [B, K] float32. Of that, by the target.
      score: [B, K] float32. Of hypotheses, and of what is kept of them.
      winner: [B] int32. The trial that is kept, where all have ended.
      num_kept: [B] int32. How many of its tokens, at least 1.
      state: of the strategy, `trials` in it.
    """
    B, K = token.shape
    rows, lanes = jnp.arange(B), jnp.arange(K)[None]
    is_over = trials.has_ended.all(axis=1)
    source = jnp.where(before.are_none[:, None] & (lanes < trials.num[:, None]), 0, lanes)
    length = seen.prompt_len + trials.start + num_kept
    is_new = length > seen.length  # the last token that is kept is of this round
    parent = source[rows, winner]
    last = jnp.where(is_new, token[rows, winner], seen.tokens[rows, parent, length - 1])

    def kept(of_first: jax.Array, of_waiting: jax.Array, otherwise: jax.Array) -> jax.Array:
        """[B, K]: where all is over, of the first hypothesis and of those that wait; else."""
        alone = jnp.where(lanes == 0, of_first[:, None], of_waiting)
        return jnp.where(is_over[:, None], alone, otherwise)

    nothing = jnp.full((B, K), -1, jnp.int32)
    written = jnp.where(is_written, token, nothing)
    return Choice(
        source=kept(parent, jnp.broadcast_to(lanes, (B, K)), source),
        token=kept(jnp.where(is_new, last, -1), nothing, written),
        log_prob=kept(log_prob[rows, winner], log_prob, log_prob),
        score=kept(score[rows, winner], jnp.full((B, K), NEVER), score),
        # What has ended reads something: nobody asks for what follows.
        candidates=kept(last, jnp.zeros_like(token), jnp.maximum(written, 0))[:, :, None],
        node=jnp.zeros((B, K), jnp.int32),
        length=jnp.where(is_over, length, seen.length + 1),
        is_done=is_over & seen.is_end(last),
        state=state.replace(
            trials=trials.replace(num=jnp.where(is_over, 1, trials.num)),
        ),
    )
