"""Beam search: of all hypotheses of a length the K most probable go on.

References: Wu et al., "Google's Neural Machine Translation System", arXiv:1609.08144, Eq. 14 (the
norm, with an offset of 5); Hugging Face's `generate` (an offset of 0, who counts as ended, when it
ends). A hypothesis of n tokens, end-of-text included, has

    score = sum of log-probabilities / norm(n),    norm(n) = ((offset + n) / (offset + 1))^penalty

Of the 2K best continuations those that end a text, if they are among the first K, are put aside,
where the K best are kept; of the others the first K go on. It ends when K are put aside and none of
those that go on can get better, as far as `ends` looks:

    "first"   it is not looked: K texts are enough
    "now"     if they ended here (Hugging Face's default)
    "safe"    if they had the length that suits them best

Letters: B prompts, K hypotheses, C continuations that are looked at, G completion positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from decode.search.contracts import NEVER, Choice, Results, Round, Strategy, Texts, exists, taken
from dlm.config import ModelConfig


class BeamState(struct.PyTreeNode):
    """Texts that were put aside.

    Attributes:
      tokens: [B, K, G] int32.
      log_prob: [B, K, G] float32.
      num_tokens: [B, K] int32.
      score: [B, K] float32. The best first; `NEVER`: there is none.
      is_done: [B] bool. Whether they are all.
    """

    tokens: jax.Array
    log_prob: jax.Array
    num_tokens: jax.Array
    score: jax.Array
    is_done: jax.Array

    @classmethod
    def none(cls, B: int, K: int, G: int) -> BeamState:
        """Room for K."""
        return cls(
            tokens=jnp.zeros((B, K, G), jnp.int32),
            log_prob=jnp.zeros((B, K, G)),
            num_tokens=jnp.zeros((B, K), jnp.int32),
            score=jnp.full((B, K), NEVER),
            is_done=jnp.zeros(B, bool),
        )

    def with_better(
        self, tokens: jax.Array, log_prob: jax.Array, num_tokens: jax.Array, score: jax.Array
    ) -> BeamState:
        """The K best, of these and others; of equals those that were there."""
        K = self.score.shape[1]
        every = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
        best, order = jax.lax.top_k(every(self.score, score), K)
        return self.replace(
            tokens=taken(every(self.tokens, tokens), order),
            log_prob=taken(every(self.log_prob, log_prob), order),
            num_tokens=taken(every(self.num_tokens, num_tokens), order),
            score=best,
        )


@struct.dataclass
class Beam(Strategy):
    """The most probable texts, as far as K hypotheses find them.

    Attributes:
      num_beams: K >= 1. Static.
      length_penalty: any number; above 0 longer texts are favoured, as sums of log-probabilities
        are negative.
      length_offset: >= 0, see the norm.
      ends: when the search ends, see above. Static.
      min_len: >= 0, tokens before the first that may end a text.
    """

    num_beams: int = struct.field(pytree_node=False, default=4)
    length_penalty: jax.Array | float = 1.0
    length_offset: jax.Array | float = 0.0
    ends: Literal["first", "now", "safe"] = struct.field(pytree_node=False, default="now")
    min_len: jax.Array | int = 0

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {
            "beam_4": cls(),
            "beam_4_gnmt": cls(length_penalty=0.6, length_offset=5.0, ends="safe"),
        }

    def validate(self, cfg: ModelConfig) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} must be at least 1")
        if self.ends not in ("first", "now", "safe"):
            raise ValueError(f"ends={self.ends!r} must be 'first', 'now' or 'safe'")
        if not 0 <= float(self.length_offset) < math.inf:
            raise ValueError(
                f"length_offset={float(self.length_offset):g} must be finite and at least 0"
            )
        if not math.isfinite(float(self.length_penalty)):
            raise ValueError(f"length_penalty={float(self.length_penalty):g} must be finite")
        if not int(self.min_len) >= 0:
            raise ValueError(f"min_len={int(self.min_len)} must be at least 0")

    @property
    def width(self) -> int:
        return self.num_beams

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> BeamState:
        return BeamState.none(B, self.num_beams, G)

    def norm(self, num_tokens: jax.Array) -> jax.Array:
        """float32, of numbers of tokens."""
        grown = (self.length_offset + num_tokens) / (self.length_offset + 1.0)
        return jnp.asarray(grown, jnp.float32) ** self.length_penalty

    def choose(self, seen: Round, state: BeamState) -> Choice:
        # Twice as many as go on: however many end a text, enough are left.
        tokens, log_probs = (x[:, :, 0] for x in seen.best(2 * self.width))
        return self.advance(seen, state, tokens, log_probs, seen.score[:, :, None] + log_probs)

    def advance(
        self,
        seen: Round,
        state: BeamState,
        tokens: jax.Array,
        log_probs: jax.Array,
        total: jax.Array,
        reach: jax.Array | None = None,
    ) -> Choice:
        """A round of K hypotheses.

        Args:
          seen: the round, of these hypotheses.
          state: what was put aside of them.
          tokens: [B, K, c] int32. The likeliest continuations of each.
          log_probs: [B, K, c] float32. Of these.
          total: [B, K, c] float32. Scores of hypotheses that go on with them.
          reach: [B, K, c] float32. What the score of a text that begins so can be at most, before
            the norm; None: as scores only fall, `total`.
        """
        B, K, c = tokens.shape
        may_end = seen.num_written + 1 > self.min_len
        # At first all hypotheses are the same one.
        is_copy = seen.is_first[:, None] & (jnp.arange(K) > 0)[None]
        is_none = is_copy[:, :, None] | (seen.is_end(tokens) & ~may_end[:, None, None])
        reach = jnp.where(is_none, NEVER, total if reach is None else reach)
        total = jnp.where(is_none, NEVER, total)
        C = min(2 * K, K * c)
        total, index = jax.lax.top_k(total.reshape(B, K * c), C)
        source = (index // c).astype(jnp.int32)
        token, log_prob = (taken(x.reshape(B, K * c), index) for x in (tokens, log_probs))

        is_end, num_tokens = seen.is_end(token), seen.num_written + 1
        ends = is_end & (jnp.arange(C) < K)[None] & (total > NEVER / 2)
        ends &= (seen.active & ~state.is_done)[:, None]
        aside = state.with_better(
            *_with(seen.texts(), source, token, log_prob),
            jnp.broadcast_to(num_tokens[:, None], token.shape),
            jnp.where(ends, total / self.norm(num_tokens)[:, None], NEVER),
        )
        is_done = state.is_done | self._is_enough(seen, aside, reach.max(axis=(1, 2)))
        best, on = jax.lax.top_k(jnp.where(is_end, 2 * NEVER, total), K)
        token = taken(token, on)
        return Choice(
            source=taken(source, on),
            token=token,
            log_prob=taken(log_prob, on),
            score=best,
            candidates=token[:, :, None],
            node=jnp.zeros((B, K), jnp.int32),
            is_done=is_done,
            state=aside.replace(is_done=is_done),
        )

    def _is_enough(self, seen: Round, aside: BeamState, best: jax.Array) -> jax.Array:
        """[B] bool: whether no hypothesis gets better than the worst text that was put aside.

        `best` [B] is the highest score, before the norm, that they can have.
        """
        worst = aside.score[:, -1]
        if self.ends == "first":
            return worst > NEVER / 2
        norm = self.norm(seen.num_written + 1)
        if self.ends == "safe":
            longest = self.norm(seen.end - seen.prompt_len)
            norm = jnp.where(jnp.asarray(self.length_penalty) > 0, longest, norm)
        return (worst > NEVER / 2) & (worst >= best / norm)

    def finish(self, texts: Texts, state: BeamState) -> Results:
        """What was put aside and, where the length ended the search, what was under way."""
        score = texts.score / self.norm(texts.num_tokens)[:, None]
        is_there = exists(texts.score) & ~state.is_done[:, None]
        # What could not go on is still more than a place where nothing was put aside.
        aside = state.replace(score=jnp.where(exists(state.score), state.score, 2 * NEVER))
        found = aside.with_better(
            texts.tokens,
            texts.log_prob,
            jnp.broadcast_to(texts.num_tokens[:, None], score.shape),
            jnp.where(is_there, score, NEVER),
        )
        return Results(
            found.tokens, found.log_prob, found.num_tokens, jnp.maximum(found.score, NEVER)
        )


def _with(
    texts: Texts, source: jax.Array, token: jax.Array, log_prob: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tokens and log-probabilities [B, C, G] of hypotheses, each with one token more [B, C]."""
    B, G = texts.num_tokens.shape[0], texts.tokens.shape[2]
    here = (jnp.arange(G)[None] == texts.num_tokens[:, None]).reshape(B, 1, G)
    return (
        jnp.where(here, token[:, :, None], taken(texts.tokens, source)),
        jnp.where(here, log_prob[:, :, None], taken(texts.log_prob, source)),
    )
