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

import numpy as np

from decode.complete import complete
from decode.core.requests import Prompt
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
    prompts: Sequence[Prompt],
    drafter: Drafter,
    *,
    gen_len: int = 256,
    batch_size: int | None = None,
) -> list[Parting | None]:
    """Per prompt: where the greedy text with a drafter parts from the one without; None: nowhere.

    Args:
      lm: the target.
      prompts: strings or token ids.
      drafter: whose drafts are accepted where they are the target's arg-max.
      gen_len: most tokens to write.
      batch_size: rows at once.

    Raises:
      ValueError: on prompts or lengths that make no sense, in one sentence.
    """
    some = list(prompts)
    plain = complete(lm, some, gen_len=gen_len, batch_size=batch_size, top_logprobs=2)
    fast = complete(lm, some, gen_len=gen_len, batch_size=batch_size, drafter=drafter)
    report: list[Parting | None] = []
    for a, b in zip(plain, fast, strict=True):
        shared = min(len(a.canvas), len(b.canvas))
        differs = a.canvas[:shared] != b.canvas[:shared]
        place = int(np.argmax(differs)) if differs.any() else shared
        if place == len(a.canvas) == len(b.canvas):
            report.append(None)
            continue
        at = lambda canvas, place=place: int(canvas[place]) if place < len(canvas) else None  # noqa: E731
        assert a.top is not None
        best = np.asarray(a.top.log_probs)[min(place, len(a.canvas) - 1)]
        report.append(Parting(place, at(a.canvas), at(b.canvas), float(best[0] - best[1])))
    return report
