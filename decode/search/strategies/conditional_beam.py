"""Conditional beam search: the most probable texts among those that have an attribute.

Reference: Yoshida, Goyal and Gimpel, "MAP's not dead yet: Uncovering true language model modes by
conditioning away degeneracy", arXiv:2311.08817, Sec. 5 (attribute-conditional beam search). The
most probable text of all is often empty, cut short or a loop; searched for is that of
log P(y | x, A), and a hypothesis u is worth

    log p(u) + log q(A | u)

where q is how probable it is that a text that goes on from u by the model's own will has A. It is
asked anew in every round and never summed up. A text that ends has the attribute, which then adds
nothing, or lacks it, and comes behind all that have it. Of each hypothesis the `num_tried` most
probable tokens are looked at, and always the most probable one of those that end a text.

The search ends when K texts are put aside and no hypothesis could become better than these even if
its q were 1. Scores are log-probabilities of texts, below `LACKS / 2` of those that lack A: where
there are no others, the most probable of these are what is found.

That no n tokens come up twice is `SearchMethod.no_repeat_ngram`, a mask, which is exact.

Letters: B prompts, K hypotheses, c candidates, G completion positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import Part, check_numbers
from decode.search.contracts import NEVER, Choice, Results, Round, Strategy, Texts, Weighed, exists
from decode.search.strategies.beam import Beam, BeamState
from dlm.config import ModelConfig
from dlm.heads.length import LengthHead, log_buckets, log_within
from dlm.params import Params

LACKS = -1e5  # what a text that lacks the attribute is worth less
NO_END = 2**30


@struct.dataclass
class Attribute(Part):
    """What is wanted of texts."""

    def log_prob(self, seen: Round, tokens: jax.Array) -> jax.Array:
        """[B, K, c] float32: log P(A | a hypothesis and a token behind it); `LACKS`: impossible.

        Args:
          seen: the round.
          tokens: [B, K, c] int32. What is said of those that end a text does not count.
        """
        raise NotImplementedError

    def holds(self, texts: Texts, has_ended: bool) -> jax.Array:
        """[B, K] bool: whether texts have it that end here, in the longest length or by a token.

        Args:
          texts: they; an end-of-text is not among their tokens.
          has_ended: whether one follows.
        """
        raise NotImplementedError


@struct.dataclass
class Length(Attribute):
    """A text of some length, end-of-text included; by default one that is not empty.

    Without a head q is 1 as long as the length is possible. That is exact of texts that are not
    empty (`least` = 2), which then are those that do not end at once.

    Attributes:
      least: >= 1, tokens.
      most: any number from `least` on; with one, texts must end, and as many that is the length.
      own: parameters of `dlm.heads.length`, for the model; None: no head.
    """

    least: jax.Array | int = 2
    most: jax.Array | int = NO_END
    own: Params | None = None

    def validate(self, cfg: ModelConfig) -> None:
        if not int(self.least) >= 1:
            raise ValueError(f"least={int(self.least)} must be at least 1")
        if not int(self.most) >= int(self.least):
            raise ValueError(f"most={int(self.most)} must be at least least={int(self.least)}")
        if self.own is not None and (missing := sorted({*LengthHead().specs(cfg)} - {*self.own})):
            raise ValueError(
                f"own has no {missing[0]!r}: it must be what dlm.heads.length.load gives"
            )
        if self.own is not None and self.own["w"].shape[0] != cfg.d_model:
            raise ValueError(
                f"own is of a model with d_model={self.own['w'].shape[0]}, which must be "
                f"{cfg.d_model}: train a head for this model"
            )

    def log_prob(self, seen: Round, tokens: jax.Array) -> jax.Array:
        written = (seen.num_written + 1)[:, None, None]
        low, high = jnp.maximum(self.least - written, 1), self.most - written
        if self.own is None:
            log_q = jnp.zeros(tokens.shape)
        else:
            found = log_buckets(self.own, seen.hidden, seen.embed(tokens))
            log_q = log_within(found, low, jnp.maximum(high, low))
        return jnp.where(high >= 1, log_q, LACKS)

    def holds(self, texts: Texts, has_ended: bool) -> jax.Array:
        n = (texts.num_tokens + has_ended)[:, None]
        is_within = (n >= self.least) & ((n <= self.most) if has_ended else (self.most >= NO_END))
        return jnp.broadcast_to(is_within, texts.score.shape)


@struct.dataclass
class ConditionalBeam(Strategy):
    """The most probable texts that have an attribute, as far as K hypotheses find them.

    Attributes:
      attribute: what they must have.
      num_beams: K >= 1. Static.
      num_tried: >= 1, tokens behind each hypothesis that are looked at; at least 2 K, of a
        vocabulary that has as many. Static.
      weight: >= 0, of log q; 1: the publication's.
      floor: in (0, 1], the least q of what is possible: heads are too sure.
    """

    attribute: Attribute = Length()
    num_beams: int = struct.field(pytree_node=False, default=5)
    num_tried: int = struct.field(pytree_node=False, default=50)
    weight: jax.Array | float = 1.0
    floor: jax.Array | float = 1e-4

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"conditional_beam_5": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if not isinstance(self.attribute, Attribute):
            raise ValueError(f"attribute={self.attribute!r} must be of class Attribute")
        check_numbers(self.attribute)
        self.attribute.validate(cfg)
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} must be at least 1")
        if self.num_tried < min(2 * self.num_beams, cfg.vocab_size):
            raise ValueError(
                f"num_tried={self.num_tried} must be at least twice num_beams={self.num_beams}"
            )
        if not 0 <= float(self.weight) < float("inf"):
            raise ValueError(f"weight={float(self.weight):g} must be finite and at least 0")
        if not 0 < float(self.floor) <= 1:
            raise ValueError(f"floor={float(self.floor):g} must be in (0, 1]")

    @property
    def width(self) -> int:
        return self.num_beams

    @property
    def _beam(self) -> Beam:
        """What keeps hypotheses, without a norm."""
        return Beam(num_beams=self.num_beams, length_penalty=0.0)

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> BeamState:
        return self._beam.init(cfg, B, S, G)

    def choose(self, seen: Round, state: BeamState) -> Choice:
        tokens, log_probs, total, log_q = self._candidates(seen)
        reach = jnp.where(log_q > LACKS / 2, total, total + LACKS)
        return self._beam.advance(seen, state, tokens, log_probs, total + log_q, reach)

    def weigh(self, seen: Round, state: BeamState) -> Weighed:
        tokens, _, total, log_q = self._candidates(seen)
        value = jnp.where(exists(seen.score)[:, :, None], total + log_q, NEVER)
        return Weighed(tokens, value, {"log p": total, "log q": log_q}).best()

    def _candidates(self, seen: Round) -> tuple[jax.Array, ...]:
        """What may come next, its log-probability, that of the text with it, and the weighted one
        that the text will have the attribute: [B, K, num_tried + 1] each."""
        every = seen.log_probs()[:, :, 0]  # [B, K, V]
        tokens, log_probs = (x[:, :, 0] for x in seen.best(self.num_tried))
        is_end = seen.is_end(jnp.arange(every.shape[2]))[None, None]
        end = jnp.argmax(jnp.where(is_end, every, -jnp.inf), axis=2, keepdims=True)
        is_new = seen.is_end(end) & (tokens != end).all(axis=2, keepdims=True)
        of_end = jnp.where(is_new, jnp.take_along_axis(every, end, axis=2), NEVER)
        tokens = jnp.concatenate([tokens, end], axis=2).astype(jnp.int32)
        log_probs = jnp.concatenate([log_probs, of_end], axis=2)

        texts = seen.texts()
        possible = self.attribute.log_prob(seen, tokens)
        log_q = self.weight * jnp.maximum(possible, jnp.log(self.floor))
        log_q = jnp.where(possible > LACKS / 2, log_q, LACKS)
        at_end = jnp.where(self.attribute.holds(texts, has_ended=True), 0.0, LACKS)
        log_q = jnp.where(seen.is_end(tokens), at_end[:, :, None], log_q)
        return tokens, log_probs, _log_prob(texts)[:, :, None] + log_probs, log_q

    def finish(self, texts: Texts, state: BeamState) -> Results:
        lacks = jnp.where(self.attribute.holds(texts, has_ended=False), 0.0, LACKS)
        score = jnp.where(exists(texts.score), _log_prob(texts) + lacks, NEVER)
        return self._beam.finish(texts.replace(score=score), state)


def _log_prob(texts: Texts) -> jax.Array:
    """[B, K] float32: of texts as a whole."""
    is_written = jnp.arange(texts.log_prob.shape[2])[None] < texts.num_tokens[:, None]
    return jnp.where(is_written[:, None], texts.log_prob, 0.0).sum(axis=2)
