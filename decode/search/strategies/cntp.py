"""Cautious next token prediction: where the model is unsure, several trials, and the surest stays.

Reference: Wang et al., "Cautious Next Token Prediction", arXiv:2507.03038, and the public code.
Where the next token's distribution has entropy H, in nats,

    N = floor(1 + (Nmax - 1) clamp((H - Hmin) / (Hmax - Hmin), 0, 1))      the code
    N = clamp(floor(Nmax (H - Hmin) / (Hmax - Hmin)), 1, Nmax)             the paper

trials are drawn, each until punctuation, the end of the text or a limit of tokens, the mark and the
end included; that of the lowest perplexity is written as a whole. Entropies and perplexities are
those of what is drawn from, over the temperature and after filters. With N = 1 a token is drawn as
by ordinary sampling, and the rows of further trials are not read.

Deviations: trials have a limit (`max_len`), which the public code has not. Its punctuation is the
first token of what each mark is encoded as; here it is every token whose text is a mark.

Letters: B prompts, K hypotheses, w of them that were read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.sampling import Sampling, draw
from decode.core.streams import fold_in
from decode.search.contracts import NEVER, Choice, Results, Round, Strategy, Texts, exists
from decode.search.strategies.trials import Trials, check_mask, go_on, of_read
from dlm.config import ModelConfig
from dlm.lm import LanguageModel
from dlm.tokenizer import Tokenizer

MARKS = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")


class CNTPState(struct.PyTreeNode):
    """What is tried, and what it took.

    Attributes:
      trials: those under way.
      num_drawn: [B] int32. Tokens of all trials so far.
      num_unsure: [B] int32. How often there was more than one.
      num_read: [B] int32. Tokens that were read, each of every trial.
    """

    trials: Trials
    num_drawn: jax.Array
    num_unsure: jax.Array
    num_read: jax.Array


@struct.dataclass
class CNTP(Strategy):
    """Draws several continuations up to the next punctuation where the model is unsure.

    Attributes:
      max_trials: Nmax >= 1. Static.
      min_entropy: Hmin, any number below `max_entropy`.
      max_entropy: Hmax, any number.
      max_len: >= 1, most tokens of a trial.
      punctuation: [V] bool. Tokens that end a trial, see `punctuation_mask`; None: those of the
        model's tokenizer, which `complete` knows; without it trials end with the text or at
        `max_len`.
      formula: "code" or "paper", how many trials. Static.
    """

    draws: ClassVar[bool] = True
    sampling: ClassVar[Sampling] = Sampling(0.8, top_p=0.95)
    takes_back: ClassVar[bool] = True

    max_trials: int = struct.field(pytree_node=False, default=10)
    min_entropy: jax.Array | float = 0.01
    max_entropy: jax.Array | float = 1.5
    max_len: jax.Array | int = 64
    punctuation: jax.Array | None = None
    formula: Literal["code", "paper"] = struct.field(pytree_node=False, default="code")

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"cntp": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if self.max_trials < 1:
            raise ValueError(f"max_trials={self.max_trials} must be at least 1")
        low, high = float(self.min_entropy), float(self.max_entropy)
        if not abs(low) < float("inf"):
            raise ValueError(f"min_entropy={low:g} must be a finite number")
        if not low < high:
            raise ValueError(f"max_entropy={high:g} must be above min_entropy={low:g}")
        if not int(self.max_len) >= 1:
            raise ValueError(f"max_len={int(self.max_len)} must be at least 1")
        if self.formula not in ("code", "paper"):
            raise ValueError(f"formula={self.formula!r} must be 'code' or 'paper'")
        if self.punctuation is not None:
            check_mask("punctuation", self.punctuation, cfg)

    def for_model(self, lm: LanguageModel) -> Strategy:
        if self.punctuation is not None:
            return self
        if lm.tokenizer is None:
            raise ValueError(
                "punctuation=None needs a tokenizer, which the checkpoint has not: give a mask of "
                "the vocabulary"
            )
        mask = punctuation_mask(lm.tokenizer, lm.cfg.vocab_size)
        made: Strategy = self.replace(punctuation=mask)  # type: ignore[attr-defined]
        return made

    @property
    def width(self) -> int:
        return self.max_trials

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted({1, self.max_trials}))

    @property
    def num_results(self) -> int:
        return 1

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> CNTPState:
        none = jnp.zeros(B, jnp.int32)
        return CNTPState(Trials.none(B, self.width), none, none, none)

    def num_live(self, state: CNTPState) -> jax.Array:
        return state.trials.num

    def counts(self, state: CNTPState) -> Mapping[str, jax.Array]:
        """Tokens that were drawn, how often more than one trial was, and tokens that were read."""
        names = ("num_drawn", "num_unsure", "num_read")
        return {name: getattr(state, name) for name in names}

    def num_trials(self, entropy: jax.Array) -> jax.Array:
        """N int32, of entropies [...] float32."""
        share = (entropy - self.min_entropy) / (self.max_entropy - self.min_entropy)
        if self.formula == "code":
            num = 1 + (self.max_trials - 1) * jnp.clip(share, 0, 1)
        else:
            num = jnp.clip(self.max_trials * share, 1, self.max_trials)
        return jnp.floor(num).astype(jnp.int32)

    def choose(self, seen: Round, state: CNTPState) -> Choice:
        K, before = self.width, state.trials
        is_new = before.are_none

        def of_parents(of_each: jax.Array) -> jax.Array:  # [B, w, n, V] as [B, w, V]
            return jnp.where(is_new[:, None, None], of_each[:, :1, 0], of_each[:, :, 0])

        law = of_parents(seen.probs())
        here = law[:, 0]
        entropy = -jnp.where(here > 0, here * jnp.log(jnp.where(here > 0, here, 1.0)), 0.0).sum(-1)
        trials = before.opened(self.num_trials(entropy), seen.num_written)
        is_unsure = is_new & (trials.num > 1)
        token = _drawn(seen.key, law, K, (is_unsure & seen.active).any())
        log_prob = _said(of_parents(seen.log_probs()), token)
        # Where nothing is allowed something is drawn all the same: then the trial is none.
        in_law = jnp.where(exists(log_prob), jnp.log(_said(law, token)), NEVER)

        is_written = ~trials.has_ended
        ends = seen.is_end(token) | (trials.num_tokens + 1 >= self.max_len)
        ends |= (seen.length + 1 >= seen.end)[:, None]
        if self.punctuation is not None:
            ends |= jnp.asarray(self.punctuation)[token]
        trials = trials.grown(is_written, in_law, ends)
        score = of_read(seen.score, K)
        score = jnp.where(is_new[:, None], score[:, :1], score)
        winner = jnp.argmax(trials.mean, axis=1)
        return go_on(
            seen, before, trials,
            is_written=is_written,
            token=token,
            log_prob=log_prob,
            score=score + jnp.where(is_written, in_law, 0.0),
            winner=winner,
            num_kept=trials.num_tokens[jnp.arange(len(winner)), winner],
            state=state.replace(
                num_drawn=state.num_drawn + is_written.sum(axis=1),
                num_unsure=state.num_unsure + is_unsure,
                num_read=state.num_read + before.num,
            ),
        )  # fmt: skip

    def finish(self, texts: Texts, state: CNTPState) -> Results:
        return state.trials.first_of(texts)


def _said(of_each: jax.Array, token: jax.Array) -> jax.Array:
    """[B, K]: what [B, w, V] say of tokens [B, K]; one alone speaks for all."""
    if of_each.shape[1] == 1:
        return jnp.take_along_axis(of_each[:, 0], token, axis=1)
    return jnp.take_along_axis(of_each, token[:, :, None], axis=2)[:, :, 0]


def _drawn(key: jax.Array, law: jax.Array, K: int, are_several: jax.Array) -> jax.Array:
    """[B, K] int32: a token of every trial, each from a stream of its own.

    Args:
      key: [B, 2] uint32.
      law: [B, w, V] float32. Where w is 1, it is that of all.
      K: trials.
      are_several: [] bool. Whether, with w of 1, more than the first is wanted.
    """

    def each(law: jax.Array) -> jax.Array:
        streams = jax.vmap(lambda k: fold_in(key, k))(jnp.arange(law.shape[1]))
        return jax.vmap(draw, in_axes=(0, 1), out_axes=1)(streams, law)

    if law.shape[1] == K:
        return each(law)
    every = (len(law), K, law.shape[2])
    return jax.lax.cond(
        are_several,
        lambda: each(jnp.broadcast_to(law, every)),
        lambda: jnp.broadcast_to(each(law), every[:2]),
    )


def punctuation_mask(
    tokenizer: Tokenizer,
    vocab_size: int,
    match: Literal["exact", "contains"] = "exact",
    marks: tuple[str, ...] = MARKS,
) -> np.ndarray:
    """[V] bool: tokens that are a mark of punctuation ("exact"), or hold one ("contains").

    Example:
      >>> CNTP(punctuation=punctuation_mask(lm.tokenizer, lm.cfg.vocab_size, "contains"))

    Args:
      tokenizer: the model's.
      vocab_size: V, of the model.
      match: see above.
      marks: texts.

    Raises:
      ValueError: `match` is something else.
    """
    if match not in ("exact", "contains"):
        raise ValueError(f"match={match!r} must be 'exact' or 'contains'")
    texts = [tokenizer.decode([i]) for i in range(min(vocab_size, tokenizer.vocab_size))]
    if match == "exact":
        is_one = [text in marks for text in texts]
    else:
        is_one = [any(mark in text for mark in marks) for text in texts]
    return np.pad(np.array(is_one, bool), (0, vocab_size - len(texts)))
