"""What a search has found, as completions: what `decode.complete` needs of this loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from decode.constraints.hosted import on_host
from decode.core.component import as_kind
from decode.core.results import Completion, to_text
from decode.core.texts import Loop
from decode.search import hosted
from decode.search.contracts import exists
from decode.search.loop import SearchMethod, SearchState, begin, decode, results
from dlm.lm import LanguageModel


def collect(
    state: SearchState,
    lm: LanguageModel,
    method: SearchMethod,
    num: int | None = None,
    stops: Sequence[str] = (),
) -> list[Completion]:
    """The best completions of the first `num` prompts of a state, the others in `others`.

    There are fewer others where fewer texts were found. Where none was, as no hypothesis could go
    on, the completion is how far one came, with "stuck" for a reason and a score of -inf.

    Args:
      state: a finished state, or one that is under way.
      lm: for its end-of-text id and tokenizer.
      method: for its stop ids, and how many completions are wanted.
      num: how many prompts; None: all.
      stops: strings before the first of which texts are cut.
    """
    # What only the host knows of a method is no part of a program.
    shown = results(as_kind(SearchMethod, method), state)
    asked = shown, state.num_forwards, method.strategy.counts(state.strategy)
    found, forwards, counts = jax.device_get(asked)
    ends = {*lm.cfg.eos_ids, *map(int, np.asarray(method.stop_ids).reshape(-1))}
    completions = []
    for b in range(len(forwards) if num is None else num):
        each = []
        for r in range(method.num_return):
            is_there = bool(exists(found.score[b, r]))
            if r and not is_there:
                break
            canvas = found.tokens[b, r, : found.num_tokens[b, r]]
            log_prob = found.log_prob[b, r, : len(canvas)]
            has_ended = len(canvas) > 0 and int(canvas[-1]) in ends
            tokens = canvas[: len(canvas) - has_ended]
            text, n, was_cut = to_text(lm.tokenizer, tokens, stops)
            reason = "stop" if was_cut else "eos" if has_ended else "length"
            each.append(
                Completion(
                    text=text,
                    tokens=tokens[:n],
                    num_forwards=int(forwards[b]),
                    tokens_per_forward=n / max(int(forwards[b]), 1),
                    finish_reason=reason if is_there else "stuck",
                    canvas=canvas,
                    step_map=np.arange(len(canvas), dtype=np.int32),
                    confidence=np.exp(log_prob),
                    log_prob=log_prob,
                    counts={name: int(count[b]) for name, count in counts.items()},
                    score=float(found.score[b, r]) if is_there else -math.inf,
                )
            )
        completions.append(dataclasses.replace(each[0], others=tuple(each[1:])))
    return completions


def _written(state: SearchState, method: SearchMethod) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The best texts of all prompts, as it stands: certain, or nothing of it before the end."""
    best_only = as_kind(SearchMethod, method, num_return=1)
    found = jax.device_get(results(best_only, state.replace(cache=None)))
    best = [row[0, : num[0]] for row, num in zip(found.tokens, found.num_tokens, strict=True)]
    none = [row[:0] for row in best]
    return (best, none) if method.strategy.commits else (none, best)


def _prepare(lm: LanguageModel, method: SearchMethod, prompts: Any, **asked: Any) -> SearchState:
    return begin(lm.params, lm.cfg, method, prompts, **asked)


LOOP = Loop(
    prepare=_prepare,
    decode=decode,
    reported=lambda state: state.replace(cache=None),
    written=_written,
    collect=collect,
    may_be_empty=lambda cfg: False,
)
HOSTED_LOOP = on_host(LOOP, hosted.prepare, hosted.decode)
