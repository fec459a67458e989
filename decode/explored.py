"""Searches, to be looked at: every token that was tried, with its score and what became of it.

    nodes = watch_search(lm, prompt, method="beam_4", gen_len=8)

`decode.pictures.draw_search` draws them. The search is stepped from the host, and is the one that
`decode.complete.complete` makes in one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack

import jax
import numpy as np

from decode.complete import Choices, choose, complete
from decode.core.explored import Fate, Node
from decode.core.loop import FOREVER
from decode.core.requests import OnePrompt
from decode.core.texts import begin_one, inside, read_one
from decode.search.answers import LOOP
from decode.search.contracts import exists
from decode.search.hosted import HostedSearch
from decode.search.loop import SearchMethod, SearchState, results, weighed
from decode.search.planner import Planner
from dlm.lm import LanguageModel

Text = tuple[int, ...]


def watch_search(
    lm: LanguageModel,
    prompt: OnePrompt,
    *,
    gen_len: int = 256,
    seed: int = 0,
    **choices: Unpack[Choices],
) -> list[Node]:
    """What a search for one prompt tries, in the order of its rounds.

    Of what was dropped there is what the strategy says that it weighs, `Strategy.weigh`; of a
    search on the host there is all that it has looked at, as in `Completion.explored`.

    Args:
      lm, prompt, gen_len, seed, choices: see `decode.complete.complete`; the model needs a
        tokenizer.

    Raises:
      ValueError: on prompts, lengths or options that make no sense, or a method that does not
        search.
    """
    method = choose(lm, choices)
    if isinstance(method, Planner):
        explored = complete(lm, prompt, method=method, gen_len=gen_len, seed=seed).explored
        return list(explored.nodes) if explored is not None else []
    if not isinstance(method, SearchMethod):
        raise ValueError(f"method={choices.get('method')!r} must be one that searches")
    if isinstance(method, HostedSearch):
        raise ValueError("constraint must be None or traced: one on the host is not watched")
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer that could be read, to show tokens with")
    method = method.replace(num_return=method.strategy.num_results)
    method.validate(lm.cfg)
    return list(inside(lm, _explored(lm, method, *read_one(lm, prompt, gen_len, seed))))


def _explored(
    lm: LanguageModel, method: SearchMethod, prompt: list[int], gen_len: int, seed: int
) -> Iterator[Node]:
    """As `watch_search`."""
    state = begin_one(lm, LOOP, method, prompt, gen_len, seed)
    tried = _Tried(lm)
    texts: list[Text] = [()] * state.score.shape[1]  # what each hypothesis has really written
    while not bool(state.has_stopped.all()):
        each, source, token = jax.device_get(weighed(lm.params, lm.cfg, method, state))
        for k in _under_way(state, texts):
            for c, token_id in enumerate(each.tokens[0, k].tolist()):
                if token_id >= 0 and exists(each.value[0, k, c]):
                    parts = {name: float(part[0, k, c]) for name, part in each.parts.items()}
                    tried.add((*texts[k], token_id), float(each.value[0, k, c]), parts)
        state = LOOP.decode(lm.params, lm.cfg, method, state, 1, FOREVER)
        length, score = _num_written(state), jax.device_get(state.score[0])
        grown = [(*texts[s], t) if t >= 0 else texts[s]
                 for s, t in zip(source[0].tolist(), token[0].tolist(), strict=True)]  # fmt: skip
        texts = [text[:length] for text in grown]
        for k in np.flatnonzero(exists(score)).tolist():
            tried.add(grown[k], float(score[k]))
            tried.set_fate(grown[k], "kept")
    found = jax.device_get(results(method, state.replace(cache=None)))
    for r in reversed(range(method.num_return)):
        text = tuple(found.tokens[0, r, : found.num_tokens[0, r]].tolist())
        if exists(found.score[0, r]):
            tried.add(text, float(found.score[0, r]))
            tried.set_fate(text, "found")
            for n in range(len(text) + 1) if r == 0 else ():
                tried.set_fate(text[:n], "won")
    yield from tried.nodes


def _num_written(state: SearchState) -> int:
    """Tokens of the first prompt's completions."""
    return int(state.length[0] - state.prompt_len[0])


def _under_way(state: SearchState, texts: Sequence[Text]) -> list[int]:
    """Hypotheses of the first prompt that go on, one of each text."""
    score, num_written = jax.device_get(state.score[0]), _num_written(state)
    found: dict[Text, int] = {}
    for k, text in enumerate(texts):
        if exists(score[k]) and len(text) == num_written:  # a shorter one has ended before
            found.setdefault(text, k)
    return list(found.values())


class _Tried:
    """Texts, each with the node that ends it."""

    def __init__(self, lm: LanguageModel) -> None:
        self.nodes: list[Node] = []
        self._lm = lm
        self._number: dict[Text, int] = {(): -1}

    def add(self, text: Text, score: float, parts: Mapping[str, float] | None = None) -> None:
        """A text that was tried; what is there stays as it is."""
        if text in self._number:
            return
        if text[:-1] not in self._number:  # a strategy wrote several tokens at once
            self.add(text[:-1], score)
        assert self._lm.tokenizer is not None
        shown = self._lm.tokenizer.decode([text[-1]], skip_special_tokens=False)
        self._number[text] = len(self.nodes)
        self.nodes.append(Node(self._number[text[:-1]], shown, "dropped", score, parts or {}))

    def set_fate(self, text: Text, fate: Fate) -> None:
        """Says what became of a text; nothing of the empty one."""
        if text:
            number = self._number[text]
            self.nodes[number] = dataclasses.replace(self.nodes[number], fate=fate)
