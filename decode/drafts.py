"""Rounds of draft and verify, to be looked at: what was drafted, and what of it was kept.

    for round in watch_drafts(lm, prompt, drafter=TokenRecycling(), gen_len=64):
        print(round.num_accepted, "of", round.num_drafts, "drafts were right")

`decode.pictures.draw_drafts` draws them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Unpack

import jax
import numpy as np

from decode.complete import Choices, choose
from decode.core.loop import FOREVER
from decode.core.requests import OnePrompt
from decode.core.texts import begin_one, inside, read_one
from decode.speculative.answers import LOOP
from decode.speculative.loop import SpeculativeMethod, drafted
from dlm.lm import LanguageModel


@dataclasses.dataclass(frozen=True)
class DraftRound:
    """A draft tree of one text, and what became of it.

    Attributes:
      step: the number of the round, from 0, as in `Completion.step_map`.
      tokens: [n] int32. Of the root, the last token before the round, and of the drafts under it.
      parents: [n] int32. The number of each one's parent, which comes before it; of the root: -1.
      path: numbers of those that were kept, from the root down. Of siblings with equal tokens the
        first is named.
      written: [m] int32. Tokens that the round has written: the drafts of the path, and the
        target's own behind them unless the text has ended before.
    """

    step: int
    tokens: np.ndarray
    parents: np.ndarray
    path: tuple[int, ...]
    written: np.ndarray

    @property
    def num_drafts(self) -> int:
        """Drafts that were judged."""
        return len(self.tokens) - 1

    @property
    def num_accepted(self) -> int:
        """Drafts that were kept."""
        return len(self.path) - 1


def watch_drafts(
    lm: LanguageModel,
    prompt: OnePrompt,
    *,
    gen_len: int = 256,
    seed: int = 0,
    **choices: Unpack[Choices],
) -> Iterator[DraftRound]:
    """The rounds in which `complete` writes a text, one after the other, with their drafts.

    Args:
      lm, prompt, gen_len, seed, choices: see `decode.complete.complete`.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, or with a controller, which has
        a part of the drafts judged.
    """
    method = choose(lm, choices)
    if type(method) is not SpeculativeMethod:
        raise ValueError(
            f"method={type(method).__name__} must be a SpeculativeMethod: others search, or judge "
            "drafts of two rounds at once"
        )
    if method.controller is not None:
        raise ValueError(
            f"controller={method.controller} must be None: with one, a part of a tree is judged"
        )
    method.validate(lm.cfg)
    return inside(lm, _rounds(lm, method, *read_one(lm, prompt, gen_len, seed)))


def _rounds(
    lm: LanguageModel, method: SpeculativeMethod, prompt: list[int], gen_len: int, seed: int
) -> Iterator[DraftRound]:
    """As `watch_drafts`."""
    state = begin_one(lm, LOOP, method, prompt, gen_len, seed)
    while not state.has_stopped.all():
        tree = drafted(lm.params, lm.cfg, method, state)
        tokens, parents, is_valid = _first_row(tree.tokens, tree.parents, tree.is_valid)
        step, start, counts = _first_row(
            state.num_forwards, state.length, state.acceptance_histogram
        )
        state = LOOP.decode(lm.params, lm.cfg, method, state, 1, FOREVER)
        text, stop, counts_now = _first_row(state.tokens, state.length, state.acceptance_histogram)
        accepted = int((counts_now - counts).argmax())
        yield _judged(int(step), tokens, parents, is_valid, text[start:stop], accepted)


def _first_row(*arrays: jax.Array) -> list[np.ndarray]:
    """Copies: the arrays of a state are given away with it."""
    return [np.array(x[0]) for x in jax.device_get(arrays)]


def _judged(
    step: int,
    tokens: np.ndarray,
    parents: np.ndarray,
    is_valid: np.ndarray,
    written: np.ndarray,
    accepted: int,
) -> DraftRound:
    """The nodes [W] that exist, numbered anew, and the way that was gone through them."""
    number = np.cumsum(is_valid) - 1
    tokens, parents = tokens[is_valid], parents[is_valid]
    parents = np.where(parents < 0, -1, number[parents])
    path = [0]
    for token in written[:accepted]:
        path.append(int(np.argmax((parents == path[-1]) & (tokens == token))))
    return DraftRound(step, tokens, parents, tuple(path), written)
