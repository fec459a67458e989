"""How good partial answers are: what A*-decoding is told of them.

Letters: n texts, T positions, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.window import Window


@dataclasses.dataclass(frozen=True)
class Partial:
    """A partial answer.

    Attributes:
      ids: token ids, the prompt's first.
      prompt: as text.
      text: what stands behind it.
      step_log_prob: [n] float32. Log-probabilities of the tokens of its last step.
      is_end: whether the answer is whole.
    """

    ids: tuple[int, ...]
    prompt: str
    text: str
    step_log_prob: np.ndarray
    is_end: bool


class StepScorer:
    """Scores partial answers."""

    def score(self, lm: LanguageModel, answers: Sequence[Partial]) -> Sequence[float]:
        """A number in [0, 1] for each, the larger the better."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class SelfConfidence(StepScorer):
    """How probable the last step is: exp of the mean log-probability of its tokens.

    The baseline without anything learned; a search with it is not the published system.
    """

    def score(self, lm: LanguageModel, answers: Sequence[Partial]) -> list[float]:
        of = lambda x: float(np.exp(x.mean())) if len(x) else 1.0  # noqa: E731
        return [min(of(answer.step_log_prob), 1.0) for answer in answers]


@dataclasses.dataclass(frozen=True)
class Verifier(StepScorer):
    """What a task can check of a partial answer.

    Example:
      >>> Verifier(countdown.progress), Verifier(functools.partial(countdown.progress, target=24))

    Attributes:
      progress: of a prompt, what stands behind it and whether that is all: a number in [0, 1].
    """

    progress: Callable[[str, str, bool], float]

    def score(self, lm: LanguageModel, answers: Sequence[Partial]) -> list[float]:
        return [self.progress(a.prompt, a.text, a.is_end) for a in answers]


@dataclasses.dataclass(frozen=True)
class ValueHead(StepScorer):
    """A trained head on the final state of the last token; its logit goes through a sigmoid.

    All texts are read at once, by a program of their number and length: few if `num_rows` is that
    of an expansion.

    Attributes:
      head: makes logits [n] of states [n, D].
      num_rows: >= 1, texts that are read at once.
    """

    head: Callable[[jax.Array], jax.Array]
    num_rows: int = 4

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ValueError(f"num_rows={self.num_rows} must be at least 1")

    def score(self, lm: LanguageModel, answers: Sequence[Partial]) -> list[float]:
        longest = max(len(answer.ids) for answer in answers)
        T = min(-(-longest // 64) * 64, lm.cfg.max_seq_len)
        scores: list[float] = []
        for first in range(0, len(answers), self.num_rows):
            some = answers[first : first + self.num_rows]
            tokens = np.full((self.num_rows, T), lm.cfg.pad_token_id, np.int32)
            length = np.ones(self.num_rows, np.int32)
            for b, answer in enumerate(some):
                tokens[b, : len(answer.ids)], length[b] = answer.ids, len(answer.ids)
            last = _last_states(lm.params, lm.cfg, tokens, length)
            scores += jax.nn.sigmoid(self.head(last))[: len(some)].tolist()
        return scores


@functools.partial(jax.jit, static_argnames=("cfg",))
def _last_states(params, cfg, tokens: jax.Array, length: jax.Array) -> jax.Array:
    """[n, D] float32: final states of the last tokens of texts [n, T] of so many tokens [n]."""
    window = Window.at(tokens, jnp.zeros_like(length), is_causal=True)
    hidden = decoder.forward(params, cfg, window).hidden
    last = jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)
    return last[:, 0].astype(jnp.float32)
