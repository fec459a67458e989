"""Superposed decoding: several drafts for one forward, which reads the mean of their last tokens.

Reference: Shen et al., "Superposed Decoding: Multiple Generations from a Single Autoregressive
Inference Pass", arXiv:2405.18400. The k drafts of a prompt, with scores s, share a row of the
cache. In every round the model reads one vector,

    e = sum_i softmax(s)_i Emb(last token of draft i)

and says one law p, at temperature tau, of which the `num_kept` most probable tokens stay. Which of
them goes with which draft is up to n-grams: with c_m the weight of contexts of m tokens, and P_m
the share of v among all that follows the last m tokens of draft i in a datastore,

    q_i(v) = sum_m c_m P_m(v)
    r_i(v) = (1 - alpha) log p(v) + alpha log q_i(v)

or, where q_i is 0 of all tokens that stay, (1 - alpha) log p(v) - penalty. The k best of all
s_i + r_i(v) are the next drafts; those that end a text are put aside, as beams are, and leave the
mean. Where q_i(v) is 0 of some only, these do not follow the draft. The end of a text is what ends
those of the datastore.

Behind the first token attention sees means, so texts get worse with their length: the publication
writes 10 tokens. Scores are no log-probabilities; those that are reported are the law's of the
mean, so read the drafts again to know how probable they are.

Letters: B prompts, K drafts, c tokens that are kept, m orders.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.datastore import SORTED_BY, Datastore, sort_suffixes
from decode.search.contracts import NEVER, Choice, Results, Round, Strategy, Texts, Weighed, exists
from decode.search.strategies.beam import Beam, BeamState
from dlm.config import ModelConfig


@struct.dataclass
class Superposed(Strategy):
    """Several drafts at the price of one, told apart by n-grams of a datastore.

    The defaults are the published ones for prompts of 15 tokens, 10 new ones and 3 drafts; alpha
    and the temperature are to be tuned together.

    Attributes:
      datastore: of `decode.core.datastore.load_datastore`, on the device: 8 bytes per token.
      num_drafts: k >= 1. Static.
      num_kept: in [num_drafts, vocab_size], tokens of a law that are looked at. Static.
      temperature: > 0, tau.
      alpha: in [0, 1], the weight of n-grams.
      orders: (c_1, ..., c_m): weights of contexts of 1 to m tokens, which need not add up to 1.
      penalty: >= 0, for drafts that no n-gram goes on with.
    """

    shares_row = True

    datastore: Datastore
    num_drafts: int = struct.field(pytree_node=False, default=3)
    num_kept: int = struct.field(pytree_node=False, default=9)
    temperature: jax.Array | float = 0.06
    alpha: jax.Array | float = 0.54
    orders: tuple[jax.Array | float, ...] = (0.01, 0.04, 0.15, 0.18, 0.12)
    penalty: jax.Array | float = 200.0

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        """Of a short text of few tokens."""
        text = np.random.default_rng(0).integers(0, min(cfg.vocab_size, 8), 300).astype(np.int32)
        suffixes = sort_suffixes(text, SORTED_BY)
        return cls(Datastore(jnp.asarray(text), jnp.asarray(suffixes), cfg.vocab_size))

    def validate(self, cfg: ModelConfig) -> None:
        if self.num_drafts < 1:
            raise ValueError(f"num_drafts={self.num_drafts} must be at least 1")
        if not self.num_drafts <= self.num_kept <= cfg.vocab_size:
            raise ValueError(
                f"num_kept={self.num_kept} must be in [num_drafts={self.num_drafts}, "
                f"vocab_size={cfg.vocab_size}]"
            )
        if not float(self.temperature) > 0:
            raise ValueError(f"temperature={float(self.temperature):g} must be positive")
        if not 0 <= float(self.alpha) <= 1:
            raise ValueError(f"alpha={float(self.alpha):g} must be in [0, 1]")
        orders = tuple(map(float, self.orders))
        if not 1 <= len(orders) < SORTED_BY or not all(x >= 0 for x in orders):
            raise ValueError(f"orders={orders} must be 1 to {SORTED_BY - 1} numbers of at least 0")
        if not float(self.penalty) >= 0:
            raise ValueError(f"penalty={float(self.penalty):g} must be at least 0")
        self.datastore.validate(cfg)

    @property
    def width(self) -> int:
        return self.num_drafts

    @property
    def _beam(self) -> Beam:
        """How drafts are chosen and put aside: when k are, it ends."""
        return Beam(num_beams=self.num_drafts, length_penalty=0.0, ends="first")

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> BeamState:
        return self._beam.init(cfg, B, S, G)

    def weights(self, score: jax.Array) -> jax.Array:
        return jax.nn.softmax(score, axis=1)

    def choose(self, seen: Round, state: BeamState) -> Choice:
        tokens, log_probs, _, _, gain = self._candidates(seen)
        return self._beam.advance(seen, state, tokens, log_probs, seen.score[:, :, None] + gain)

    def weigh(self, seen: Round, state: BeamState) -> Weighed:
        tokens, _, log_p, q, gain = self._candidates(seen)
        parts = {"p": jnp.exp(log_p), "n-grams": q}
        return Weighed(tokens, seen.score[:, :, None] + gain, parts).best()

    def _candidates(self, seen: Round) -> tuple[jax.Array, ...]:
        """Tokens, their log-probabilities, log p at tau, q and r: [B, K, c] each."""
        tokens, log_probs = (x[:, :, 0] for x in seen.best(self.num_kept))
        is_allowed = exists(log_probs)
        log_p = jax.nn.log_softmax(
            jnp.where(is_allowed, log_probs / self.temperature, NEVER), axis=2
        )
        q = jnp.where(is_allowed, self.ngrams(seen, tokens), 0.0)
        by_law = (1 - self.alpha) * log_p
        by_both = by_law + self.alpha * jnp.log(jnp.maximum(q, jnp.finfo(q.dtype).tiny))
        follows = (q > 0) | (jnp.asarray(self.alpha) == 0)
        is_known = (q > 0).any(axis=2, keepdims=True)
        gain = jnp.where(follows, by_both, NEVER)
        gain = jnp.where(is_known, gain, by_law - self.penalty)
        return tokens, log_probs, log_p, q, jnp.where(is_allowed, gain, NEVER)

    def ngrams(self, seen: Round, tokens: jax.Array) -> jax.Array:
        """q [B, K, c] float32 of tokens [B, K, c] behind the drafts."""
        (B, K, c), m = tokens.shape, len(self.orders)
        place = (seen.length[:, None] - m + jnp.arange(m)[None])[:, None]  # [B, 1, m]
        context = jnp.take_along_axis(seen.tokens, jnp.maximum(place, 0), axis=2)
        context = jnp.where(place >= 0, context, -1)
        tokens = jnp.where(seen.is_end(tokens), -1, tokens)
        shares = self.datastore.shares(context.reshape(B * K, m), tokens.reshape(B * K, c))
        weights = jnp.stack([jnp.asarray(x, jnp.float32) for x in self.orders])
        return (weights[None, :, None] * shares).sum(axis=1).reshape(B, K, c)

    def finish(self, texts: Texts, state: BeamState) -> Results:
        return self._beam.finish(texts, state)
