"""Where drafts change a greedy text, which they can only where two tokens are nearly a tie.

A forward over several positions adds up in another order than one over a single position. In
float32 that never decides a token in practice; in bfloat16 it does where the two best logits are
within rounding of each other. Both texts are then greedy ones of the model.

Example:
  >>> report = lossless_report(lm, prompts, PromptLookup(), gen_len=128)
  >>> [(parting.position, parting.margin) for parting in report if parting]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from decode.complete import complete
from decode.core.requests import Prompt, is_single
from decode.core.results import Completion
from decode.speculative.contracts import Drafter
from dlm.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class Parting:
    """The first difference between the text with drafts and the one without.

    Attributes:
      position: in the completion, from 0.
      plain: the token that stands there without drafts; None: the text ended before.
      drafted: the one with drafts; likewise.
      margin: between the two best log-probabilities there, without drafts, in nats.
    """

    position: int
    plain: int | None
    drafted: int | None
    margin: float


def lossless_report(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    drafter: Drafter,
    *,
    gen_len: int | Sequence[int] = 256,
    batch_size: int | None = None,
) -> list[Parting | None]:
    """Per prompt: where the greedy text with a drafter parts from the one without; None: nowhere.

    Args:
      lm: the target.
      prompts: strings or token ids; one is a list of one.
      drafter: whose drafts are accepted where they are the target's arg-max.
      gen_len: most tokens to write, for all or per prompt.
      batch_size: rows at once.

    Raises:
      ValueError: on prompts or lengths that make no sense, in one sentence.
    """
    some: Any = [prompts] if is_single(prompts) else list(prompts)
    plain = complete(lm, some, gen_len=gen_len, batch_size=batch_size, top_logprobs=2)
    fast = complete(lm, some, gen_len=gen_len, batch_size=batch_size, drafter=drafter)
    return [first_parting(a, b.canvas) for a, b in zip(plain, fast, strict=True)]


def first_parting(plain: Completion, canvas: np.ndarray) -> Parting | None:
    """Where a greedy text leaves the plain one; None: nowhere.

    Args:
      plain: with two `top_logprobs` at least.
      canvas: [n] int32. The tokens of the other text, its end included.
    """
    shared = min(len(plain.canvas), len(canvas))
    differs = plain.canvas[:shared] != canvas[:shared]
    place = int(np.argmax(differs)) if differs.any() else shared
    if place == len(plain.canvas) == len(canvas):
        return None
    if plain.top is None:
        raise ValueError("plain has no top: decode it with top_logprobs=2, for the margin")
    best = np.asarray(plain.top.log_probs)[min(place, len(plain.canvas) - 1)]
    at = lambda tokens: int(tokens[place]) if place < len(tokens) else None  # noqa: E731
    return Parting(place, at(plain.canvas), at(canvas), float(best[0] - best[1]))
