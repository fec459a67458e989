"""What a search strategy does: it reads what comes behind each hypothesis, and says which go on.

A prompt has K hypotheses. A round reads the last token of each, or of one hypothesis n candidates,
tokens side by side in the place behind it, where what comes behind a token decides whether it is
written (the first round reads the prompt's last token n times). Then the strategy makes the
hypotheses of the next round, each from one that there is. Prompts of a batch never see each other.

A strategy that tries several ways on now and then (`widths`) has rounds in which only the first
hypothesis is read, and the others wait. Hypotheses have a row of the cache each, or share one: then
the model reads the mean of their last tokens, and says the same of what follows each of them.

Letters: B prompts, K hypotheses, n candidates, P longest prompt, G completion positions, S slots of
tokens, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import Part
from decode.core.sampling import Sampling
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from kernels_pallas.unembed_stats import VocabStats

NEVER = -1e9  # the score of what does not exist
SHOWN = 3  # tokens behind each hypothesis, where there is no reason for another number


class Best(Protocol):
    """The k most probable tokens behind every candidate."""

    def __call__(self, k: int) -> tuple[jax.Array, jax.Array]:
        """Tokens and their log-probabilities, each [B, K, n, k], the most probable first.

        Those that may not be written come last, with `NEVER`.
        """


@dataclasses.dataclass(frozen=True)
class Round:
    """What a strategy sees; made while the loop is traced.

    Attributes:
      best: the most probable tokens, after bias, penalties and bans; nothing else of the vocabulary
        is computed for them.
      log_probs: makes [B, K, n, V] float32: all of them, likewise; `NEVER`: not allowed, where a
        constraint's `accept` is asked of tokens only that end a text.
      probs: makes [B, K, n, V] float32: what tokens are drawn from, over the temperature and after
        filters, too.
      stats: what the model itself says, with its k most probable tokens: statistics [B, K, n] of
        logits that nothing has changed.
      hidden: [B, K, n, D]. Final states of the candidates.
      candidates: [B, K, n] int32. What was read.
      tokens: [B, K, S] int32. Texts with their prompts; what is behind their ends is of no meaning.
      log_prob: [B, K, G] float32. Of the tokens of their completions.
      length: [B] int32. Their lengths.
      prompt_len: [B] int32.
      end: [B] int32. Their largest lengths.
      is_first: [B] bool. Whether the candidates are the last token of the prompt.
      is_end: of tokens [...]: whether they end a text.
      embed: makes [..., D] in the model's dtype, of tokens [...]: their embeddings.
      score: [B, K] float32. Of the hypotheses, what the strategy has made of it.
      key: [B, 2] uint32. A random stream of this round, per prompt.
      active: [B] bool. Prompts that are not done.
    """

    best: Best
    log_probs: Callable[[], jax.Array]
    probs: Callable[[], jax.Array]
    stats: Callable[[int], VocabStats]
    hidden: jax.Array
    candidates: jax.Array
    tokens: jax.Array
    log_prob: jax.Array
    length: jax.Array
    prompt_len: jax.Array
    end: jax.Array
    is_first: jax.Array
    is_end: Callable[[jax.Array], jax.Array]
    embed: Callable[[jax.Array], jax.Array]
    score: jax.Array
    key: jax.Array
    active: jax.Array

    @property
    def num_written(self) -> jax.Array:
        """[B] int32: tokens of completions so far."""
        return self.length - self.prompt_len

    def texts(self) -> Texts:
        """The hypotheses as they stand."""
        completions = completions_of(self.tokens, self.prompt_len, self.log_prob.shape[2])
        return Texts(completions, self.log_prob, self.num_written, self.score)

    def part(self, first: int, last: int) -> Round:
        """The same of hypotheses first to last - 1 only."""
        of = lambda x: x[:, first:last]  # noqa: E731

        def best(k: int) -> tuple[jax.Array, jax.Array]:
            tokens, log_probs = self.best(k)
            return of(tokens), of(log_probs)

        return dataclasses.replace(
            self,
            best=best,
            log_probs=lambda: of(self.log_probs()),
            probs=lambda: of(self.probs()),
            stats=lambda k: jax.tree.map(of, self.stats(k)),
            hidden=of(self.hidden),
            candidates=of(self.candidates),
            tokens=of(self.tokens),
            log_prob=of(self.log_prob),
            score=of(self.score),
        )


class Choice(struct.PyTreeNode):
    """The hypotheses of the next round, in any order.

    Attributes:
      source: [B, K] int32. Which hypothesis each comes from.
      token: [B, K] int32. What is written behind it; -1: nothing.
      log_prob: [B, K] float32. Of that token, by the target; `NEVER` kills the hypothesis.
      score: [B, K] float32.
      candidates: [B, K, n] int32. What is read next.
      node: [B, K] int32. Which candidate stays in the cache.
      length: [B] int32. Length of the texts from now on; None: one more. Shorter ones are taken
        back.
      is_done: [B] bool. Prompts for which nothing is left to do.
      state: of the strategy.
    """

    source: jax.Array
    token: jax.Array
    log_prob: jax.Array
    score: jax.Array
    candidates: jax.Array
    node: jax.Array
    is_done: jax.Array
    state: Any
    length: jax.Array | None = None


class Weighed(struct.PyTreeNode):
    """What is compared in a round, for those who look on.

    Attributes:
      tokens: [B, K, c] int32. What may come behind each hypothesis, or some of it; -1: nothing.
      value: [B, K, c] float32. By which it is chosen, the more the better; `NEVER`: it is not.
      parts: each [B, K, c] float32, what the value is made of, by name.
    """

    tokens: jax.Array
    value: jax.Array
    parts: dict[str, jax.Array] = struct.field(default_factory=dict)

    def best(self) -> Weighed:
        """The most valuable few behind each hypothesis; those that do not exist have `NEVER`."""
        value = jnp.where(exists(self.value), self.value, NEVER)
        value, order = jax.lax.top_k(value, min(SHOWN, value.shape[2]))
        at = lambda x: jnp.take_along_axis(x, order, axis=2)  # noqa: E731
        return Weighed(at(self.tokens), value, {name: at(x) for name, x in self.parts.items()})


class Results(struct.PyTreeNode):
    """What a search has found, the best first.

    Attributes:
      tokens: [B, R, G] int32. Completions.
      log_prob: [B, R, G] float32. Of their tokens, by the target.
      num_tokens: [B, R] int32. End-of-text included.
      score: [B, R] float32. `NEVER` where there are fewer.
    """

    tokens: jax.Array
    log_prob: jax.Array
    num_tokens: jax.Array
    score: jax.Array


class Texts(struct.PyTreeNode):
    """Hypotheses as they stand, for those who collect them.

    Attributes:
      tokens: [B, K, G] int32. Completions.
      log_prob: [B, K, G] float32.
      num_tokens: [B] int32.
      score: [B, K] float32.
    """

    tokens: jax.Array
    log_prob: jax.Array
    num_tokens: jax.Array
    score: jax.Array


@struct.dataclass
class Strategy(Part):
    """Which hypotheses go on?

    Attributes:
      draws: whether it draws tokens, so that temperature and filters mean something.
      sampling: what its named points draw from.
      takes_back: whether texts become shorter, too.
      looks_ahead: whether candidates are what may come behind a text, not its last token.
      shares_row: whether all hypotheses of a prompt are one row of the cache, whose input is the
        mean of their last tokens' embeddings, see `weights`.
      commits: whether there is one hypothesis, which is what is found, and whose tokens stay: it is
        shown as it is written, and ends at stop strings.
    """

    draws: ClassVar[bool] = False
    sampling: ClassVar[Sampling] = Sampling(temperature=None)
    takes_back: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    shares_row: ClassVar[bool] = False
    commits: ClassVar[bool] = False

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        """Named settings; none by default."""
        return {}

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        """A small one for a model, where that is not the class called without arguments."""
        return cls()

    @property
    def width(self) -> int:
        """K."""
        return 1

    @property
    def widths(self) -> tuple[int, ...]:
        """How many hypotheses, the first ones, rounds may read: rising, the last is K.

        What a round needs is said by `num_live`. It is told of those that are read, and chooses K
        all the same. If there are several widths, hypotheses stand where the strategy puts them,
        and who has children elsewhere must have one in its own place, too.
        """
        return (self.width,)

    @property
    def num_candidates(self) -> int:
        """n."""
        return 1

    @property
    def num_results(self) -> int:
        """R, most completions of a prompt that it can give."""
        return self.width

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> Any:
        """Its state before anything was seen, with a leading axis of B. Default: none."""
        return ()

    def for_model(self, lm: LanguageModel) -> Strategy:
        """The same with what it takes from a model's tokenizer; ValueError where there is none."""
        return self

    def num_live(self, state: Any) -> jax.Array:
        """[B] int32: how many hypotheses the next round needs; only asked if `widths` differ."""
        raise NotImplementedError

    def counts(self, state: Any) -> Mapping[str, jax.Array]:
        """What it has counted, [B] int32 each, for `Completion.counts`. Default: nothing."""
        return {}

    def prefill(self, hidden: jax.Array, start: jax.Array, count: jax.Array, state: Any) -> Any:
        """The state after a part of the prompt, all but its last token. Default: the same.

        Where a prompt's states are adapted, a part that was read before is read anew.

        Args:
          hidden: [B, T, D]. Final states.
          start: [B] int32. Where the first one is.
          count: [B] int32. How many of the T there are.
          state: of the strategy.
        """
        return state

    def weights(self, score: jax.Array) -> jax.Array:
        """[B, K] float32 with sums of 1: parts of hypotheses, of such scores, in a shared input."""
        raise NotImplementedError

    def choose(self, seen: Round, state: Any) -> Choice:
        """The hypotheses of the next round."""
        raise NotImplementedError

    def weigh(self, seen: Round, state: Any) -> Weighed:
        """What `choose` compares. Default: scores with the most probable tokens behind each."""
        tokens, log_probs = (x[:, :, 0] for x in seen.best(SHOWN))
        return Weighed(tokens, seen.score[:, :, None] + log_probs).best()

    def finish(self, texts: Texts, state: Any) -> Results:
        """What was found. Default: the hypotheses themselves, the best first."""
        order = jnp.argsort(-texts.score, axis=1, stable=True)
        num_tokens = jnp.broadcast_to(texts.num_tokens[:, None], order.shape)
        tokens, log_prob, score = (
            taken(x, order) for x in (texts.tokens, texts.log_prob, texts.score)
        )
        return Results(tokens, log_prob, num_tokens, score)


def exists(score: jax.Array) -> jax.Array:
    """bool: of scores, or log-probabilities, whether what they are of exists and is allowed."""
    return score > NEVER / 2


def completions_of(tokens: jax.Array, prompt_len: jax.Array, G: int) -> jax.Array:
    """[B, K, G]: what stands in texts [B, K, S] behind their prompts."""
    at = prompt_len[:, None, None] + jnp.arange(G)[None, None]
    return jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[2] - 1), axis=2)


def taken(x: jax.Array, order: jax.Array) -> jax.Array:
    """[B, K, ...] in another order [B, n] of the second axis."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def staying(source: jax.Array) -> jax.Array:
    """An order in which as many hypotheses as possible stay where they are.

    The first child of a hypothesis takes its place; further ones take, in turn, the places of those
    that have no child.

    Args:
      source: [B, K] int32. Of each child.

    Returns:
      [B, K] int32: which child comes to each place.
    """
    K = source.shape[1]
    place = jnp.arange(K)
    is_same = source[:, :, None] == source[:, None, :]
    is_before = (place[None, :] < place[:, None])[None]
    is_first = ~(is_same & is_before).any(axis=2)  # [B, K]
    has_child = (source[:, :, None] == place[None, None]).any(axis=1)  # [B, K], by place
    nth_free = jnp.cumsum(~has_child, axis=1) - 1
    nth_further = jnp.cumsum(~is_first, axis=1) - 1
    goes = is_first[:, :, None] & (source[:, :, None] == place[None, None])
    moves = ~is_first[:, :, None] & ~has_child[:, None]
    moves &= nth_further[:, :, None] == nth_free[:, None]
    return jnp.argmax(goes | moves, axis=1).astype(jnp.int32)
