"""A text while it is written: certain pieces of it as they come, and what may still change."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from decode.core.loop import FOREVER
from decode.core.requests import (
    Prompt,
)
from decode.core.results import HALF, Completion, cut, read_stops, settled
from decode.core.texts import Loop, begin_one, inside, read_one
from dlm.lm import LanguageModel
from dlm.tokenizer import Tokenizer

OPEN = "·"  # stands for a position that nothing has been decided for


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a round of decoding has brought.

    Attributes:
      text: what is new of the certain text: it is never taken back, and never half a character. All
        pieces joined are `Completion.text`.
      ahead: what stands behind the certain text and may still change, `OPEN` where nothing is
        decided; "" from autoregressive models, unless a search has several texts of theirs under
        way, of which this is the best so far.
      completion: the whole answer, with the last piece; else None.
    """

    text: str
    ahead: str = ""
    completion: Completion | None = None


@dataclasses.dataclass
class Writing:
    """A text under way, kept up to date while it is written.

    Attributes:
      state: of its loop: the latest one.
      text: what was shown of it.
    """

    state: Any
    text: str = ""


def stream_answer(
    lm: LanguageModel,
    prompt: Prompt,
    loop: Loop,
    method: Any,
    *,
    gen_len: int,
    stop: str | Sequence[str],
    seed: int,
) -> Iterator[Piece]:
    """A piece per round of a loop.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, or without a tokenizer.
    """
    check_tokenizer(lm)
    stops = read_stops(lm, stop)
    tokens, gen_len, seed = read_one(lm, prompt, gen_len, seed, loop.may_be_empty(lm.cfg))
    return inside(lm, _from_prompt(lm, tokens, loop, method, gen_len, stops, seed))


def check_tokenizer(lm: LanguageModel) -> Tokenizer:
    """The tokenizer that streaming needs; ValueError without one."""
    if lm.tokenizer is None:
        raise ValueError(
            "the checkpoint has no tokenizer that could be read, so there is no text to stream: "
            "use decode.generate or decode.complete with token ids"
        )
    return lm.tokenizer


def _from_prompt(
    lm: LanguageModel,
    tokens: list[int],
    loop: Loop,
    method: Any,
    gen_len: int,
    stops: Sequence[str],
    seed: int,
) -> Iterator[Piece]:
    """As `stream_answer`."""
    start = lambda method: begin_one(lm, loop, method, tokens, gen_len, seed)  # noqa: E731
    method = loop.ready(lm, method, start)
    yield from pieces(lm, loop, method, Writing(start(method)), stops)


def pieces(
    lm: LanguageModel, loop: Loop, method: Any, writing: Writing, stops: Sequence[str]
) -> Iterator[Piece]:
    """A piece per round, the first row's.

    Args:
      lm: with a tokenizer; its mesh is the one in use.
      loop, method: how to decode.
      writing: has the state before the first round.
      stops: strings that end the text.
    """
    tokenizer = check_tokenizer(lm)
    ends = {*lm.cfg.eos_ids, *np.asarray(method.stop_ids).reshape(-1).tolist()}
    while True:
        state = writing.state = loop.decode(lm.params, lm.cfg, method, writing.state, 1, FOREVER)
        certain, ahead = (rows[0].tolist() for rows in loop.written(state, method))
        written = _before(ends, certain + ahead)
        text = _sure(tokenizer, written[: len(certain)], stops)
        if text is None or bool(state.has_stopped.all()):
            break
        if text.startswith(writing.text):
            rest = _provisional(tokenizer, written[len(certain) :], lm.cfg.mask_token_id)
            new, writing.text = text[len(writing.text) :], text
            yield Piece(new, rest)
    (completion,) = loop.collect(loop.reported(state), lm, method, num=1, stops=stops)
    assert completion.text is not None
    new, writing.text = completion.text[len(writing.text) :], completion.text
    yield Piece(new, completion=completion)


def _before(ends: set[int], tokens: list[int]) -> list[int]:
    """Tokens before the first that ends a text."""
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def _sure(tokenizer: Tokenizer, tokens: list[int], stops: Sequence[str]) -> str | None:
    """What the text begins with whatever follows its tokens; None if it has a stop string."""
    # Half a character at the end may become any: a stop string may go on with it.
    raw = settled(tokenizer, tokens)
    if cut(raw, stops) < len(raw):
        return None
    sure = raw[: len(raw) - max((_overlap(raw, stop) for stop in stops), default=0)]
    n = len(tokens)
    while n and not sure.startswith(tokenizer.decode(tokens[:n], skip_special_tokens=False)):
        n -= 1
    return tokenizer.decode(tokens[:n]).rstrip(HALF)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text with which the stop string may have begun."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def _provisional(tokenizer: Tokenizer, tokens: list[int], mask: int | None) -> str:
    """Tokens that may change, as text; what is open at the end is left out."""
    parts = []
    for is_open, run in itertools.groupby(tokens, lambda token: token == mask):
        some = list(run)
        parts.append(OPEN * len(some) if is_open else tokenizer.decode(some))
    return "".join(parts).rstrip(OPEN)
