"""What drafting has written, as completions: what `decode.complete` needs of this loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from decode.constraints.hosted import on_host
from decode.core.results import Completion, to_text
from decode.core.texts import Loop, of_params
from decode.speculative import hosted, pearl
from decode.speculative.controller import ControllerState
from decode.speculative.costs import with_costs
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, decode, init_state, prefill
from dlm.lm import LanguageModel


def collect(
    state: SpeculativeState,
    lm: LanguageModel,
    method: SpeculativeMethod,
    num: int | None = None,
    stops: Sequence[str] = (),
) -> list[Completion]:
    """Completions of the first `num` rows of a state, fetched from the device in one go.

    Args:
      state: a finished state, or one that is under way.
      lm: for its end-of-text id and tokenizer.
      method: for its stop ids.
      num: how many rows; None: all.
      stops: strings before the first of which texts are cut.
    """
    fetched: Any = jax.device_get(state.replace(cache=None, drafter=None))
    ends = {*lm.cfg.eos_ids, *map(int, np.asarray(method.stop_ids).reshape(-1))}
    completions = []
    for b in range(len(fetched.tokens) if num is None else num):
        start, length = int(fetched.prompt_len[b]), int(fetched.length[b])
        canvas = fetched.tokens[b, start:length]
        n = len(canvas)
        reason = "length"
        if n and int(canvas[-1]) in ends:
            n, reason = n - 1, "eos"
        text, n, was_cut = to_text(lm.tokenizer, canvas[:n], stops)
        reason = "stop" if was_cut else reason
        num_forwards = int(fetched.num_forwards[b])
        log_prob = fetched.log_prob[b, : len(canvas)]
        completions.append(
            Completion(
                text=text,
                tokens=canvas[:n],
                num_forwards=num_forwards,
                tokens_per_forward=n / max(num_forwards, 1),
                finish_reason=reason,
                canvas=canvas,
                step_map=fetched.step_map[b, : len(canvas)],
                confidence=np.exp(log_prob),
                log_prob=log_prob,
                draft_forwards=int(fetched.draft_forwards[b]),
                acceptance_histogram=fetched.acceptance_histogram[b],
                rounds_by_width=_rounds_by_width(method, fetched.control, b),
                top=None if fetched.top is None else fetched.top.of_row(b, len(canvas)),
            )
        )
    return completions


def _rounds_by_width(
    method: SpeculativeMethod, control: ControllerState | None, b: int
) -> dict[int, int] | None:
    """What the controller has chosen for a row."""
    if method.controller is None or control is None:
        return None
    widths = (0, *method.controller.widths_of(method.drafter))
    return dict(zip(widths, map(int, control.rounds[b]), strict=True))


def _written(
    state: SpeculativeState, method: SpeculativeMethod
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What each row has written; all of it is certain."""
    tokens, start, length = jax.device_get((state.tokens, state.prompt_len, state.length))
    certain = [row[a:b] for row, a, b in zip(tokens, start, length, strict=True)]
    return certain, [row[:0] for row in certain]


def _prepare(lm: LanguageModel, method: SpeculativeMethod, prompts: Any, **asked: Any) -> Any:
    return prefill(lm.params, lm.cfg, method, init_state(lm.cfg, method, prompts, **asked))


LOOP = Loop(
    prepare=_prepare,
    decode=decode,
    reported=lambda state: state.replace(cache=None, drafter=None),
    written=_written,
    collect=collect,
    may_be_empty=lambda cfg: False,
    ready=lambda lm, method, start: with_costs(lm.params, lm.cfg, method, start),
)
PEARL_LOOP = dataclasses.replace(LOOP, prepare=of_params(pearl.prepare), decode=pearl.decode)
HOSTED_LOOP = on_host(LOOP, hosted.prepare, hosted.decode)
