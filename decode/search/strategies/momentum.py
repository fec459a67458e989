"""Momentum decoding: greedy on new ground, and against a resistance where the text was before.

Reference: Lan et al., "Momentum Decoding: Open-ended Text Generation As Graph Exploration",
arXiv:2212.02175, and the public code. Of the k most probable tokens v that is written for which

    p(v) - alpha f(m(v)),    m(v) = 1 + the most tokens before an earlier v that end the text, too

is largest; m is 0 for tokens that did not come up, prompts count, and f rises with m. If f is
infinite for all of them, the most probable one of least m is written.

Letters: B prompts, k candidates, S slots, L entries of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.matches import match_lengths
from decode.search.contracts import NEVER, Choice, Round, Strategy, Weighed, exists
from dlm.config import ModelConfig


@struct.dataclass
class Momentum(Strategy):
    """The probable token that repeats least.

    Attributes:
      k: >= 1, candidates. Static.
      alpha: >= 0, weight of the resistance; 0: greedy.
      resistance: (f(1), ..., f(L)); beyond L it is infinite (GPT-2 XL: 1 to 5). Static.
    """

    commits: ClassVar[bool] = True

    k: int = struct.field(pytree_node=False, default=5)
    alpha: jax.Array | float = 0.2
    resistance: tuple[float, ...] = struct.field(
        pytree_node=False, default=(1.0, 2.0, 3.0, 4.0, 5.0)
    )

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"momentum": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if not 1 <= self.k <= cfg.vocab_size:
            raise ValueError(f"k={self.k} must be in [1, vocab_size={cfg.vocab_size}]")
        if not 0 <= float(self.alpha) < math.inf:
            raise ValueError(f"alpha={float(self.alpha):g} must be finite and at least 0")
        if not isinstance(self.resistance, tuple):
            raise ValueError(f"resistance={self.resistance!r} must be a tuple of numbers")
        if not self.resistance or any(math.isnan(x) or x < 0 for x in self.resistance):
            raise ValueError(f"resistance={self.resistance} must be numbers of at least 0")

    def choose(self, seen: Round, state: tuple[()]) -> Choice:
        B = len(seen.length)
        tokens, log_probs, times, _, value = self._value(seen)
        best = jnp.argmax(value, axis=1)
        fallback = jnp.argmin(times, axis=1)  # of equals the most probable
        is_free = (value > -jnp.inf).any(axis=1)
        chosen = jnp.where(is_free, best, fallback)[:, None]
        token, log_prob = (jnp.take_along_axis(x, chosen, axis=1) for x in (tokens, log_probs))
        return Choice(
            source=jnp.zeros((B, 1), jnp.int32),
            token=token,
            log_prob=log_prob,
            score=seen.score + log_prob,
            candidates=token[:, :, None],
            node=jnp.zeros((B, 1), jnp.int32),
            is_done=seen.is_end(token[:, 0]),
            state=state,
        )

    def _value(self, seen: Round) -> tuple[jax.Array, ...]:
        """Tokens, log-probabilities, lengths of repeats, resistances and values, each [B, k]."""
        tokens, log_probs = (x[:, 0, 0] for x in seen.best(self.k))
        times = repeats(seen.tokens[:, 0], seen.length, tokens, len(self.resistance) + 1)
        table = jnp.array([0.0, *self.resistance, math.inf])
        resistance = table[times]
        # An infinite one counts however small alpha is, but for alpha = 0.
        against = jnp.where(self.alpha > 0, self.alpha * resistance, 0.0)
        is_there = exists(log_probs)
        value = jnp.where(is_there, jnp.exp(log_probs) - against, -jnp.inf)
        return tokens, log_probs, jnp.where(is_there, times, len(table)), resistance, value

    def weigh(self, seen: Round, state: tuple[()]) -> Weighed:
        tokens, log_probs, _, resistance, value = self._value(seen)
        parts = {"p": jnp.exp(log_probs)[:, None], "resists": resistance[:, None]}
        return Weighed(tokens[:, None], jnp.maximum(value, NEVER)[:, None], parts)


def repeats(text: jax.Array, length: jax.Array, tokens: jax.Array, most: int) -> jax.Array:
    """m: how long a sequence that came up before is that ends in a token behind the text.

    Args:
      text: [B, S] int32.
      length: [B] int32. Of texts.
      tokens: [B, k] int32.
      most: sequences are not told apart beyond this length.

    Returns:
      [B, k] int32 in [0, most]; 0: the token did not come up.
    """
    before = match_lengths(text, text, length, most - 1)  # up to each slot
    before = jnp.pad(before, ((0, 0), (1, 0)))[:, :-1]  # up to the slot before
    is_text = jnp.arange(text.shape[1])[None] < length[:, None]
    is_there = (text[:, None] == tokens[:, :, None]) & is_text[:, None]
    return jnp.where(is_there, 1 + before[:, None], 0).max(axis=2).astype(jnp.int32)
