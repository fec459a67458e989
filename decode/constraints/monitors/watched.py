"""A monitor over the tokens of a model: which of them it allows.

Letters: V vocabulary.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from decode.constraints.hosted import HostConstraint
from decode.constraints.monitors.contracts import Monitor, State
from dlm.lm import LanguageModel
from dlm.token_bytes import token_bytes

MOST_MASKS = 512  # kept: a byte per token each


class _Node:
    """A beginning of tokens.

    Attributes:
      children: by byte.
      first, own, last: in the order of their bytes, tokens first to own - 1 end here, those from
        there to last - 1 go on.
      bytes: all that stand somewhere below.
    """

    __slots__ = ("bytes", "children", "first", "last", "own")

    def __init__(self, first: int) -> None:
        self.children: dict[int, _Node] = {}
        self.bytes: set[int] = set()
        self.first = self.own = self.last = first


class Vocabulary:
    """Tokens as a tree of their bytes.

    Attributes:
      words: of each token, its bytes; b"": it has none, as end-of-text.
    """

    def __init__(self, words: Sequence[bytes]) -> None:
        self.words = tuple(words)
        self._order = np.array(sorted((i for i, w in enumerate(words) if w), key=words.__getitem__))
        self._silent = np.array([i for i, word in enumerate(words) if not word], np.int64)
        self._root = _Node(0)
        for place, i in enumerate(self._order.tolist()):
            path = [self._root]
            for byte in self.words[i]:
                path.append(path[-1].children.setdefault(byte, _Node(place)))
            path[-1].own = place + 1
            for node, n in zip(path, range(len(path)), strict=True):
                node.last = place + 1
                node.bytes |= set(self.words[i][n:])

    def mask(self, monitor: Monitor, state: State) -> np.ndarray:
        """[V] bool: tokens of which no byte is refused; those without any if nobody watches."""
        wakes_at = monitor.wakes_at
        found = np.zeros(len(self._order), bool)
        todo = [(self._root, state)]
        while todo:
            node, state_here = todo.pop()
            if monitor.is_dormant(state_here) and wakes_at.isdisjoint(node.bytes):
                found[node.first : node.last] = True
                continue
            found[node.first : node.own] = True
            for byte, child in node.children.items():
                if (behind := monitor.advance(state_here, byte)) is not None:
                    todo.append((child, behind))
        mask = np.zeros(len(self.words), bool)
        mask[self._order] = found
        mask[self._silent] = monitor.is_dormant(state)
        return mask


class Watched(HostConstraint):
    """What a monitor allows.

    Tokens that end a text are allowed where it may end, others without bytes where nothing is asked
    of what follows: behind an answer that is whole they would say nothing, and not end it.

    Attributes:
      monitor: what is asked.
      vocabulary: what tokens say.
      ends: tokens that end a text.
    """

    def __init__(self, monitor: Monitor, vocabulary: Vocabulary, ends: Iterable[int]) -> None:
        self.monitor, self.vocabulary, self.ends = monitor, vocabulary, frozenset(ends)
        self._masks: collections.OrderedDict[State, np.ndarray] = collections.OrderedDict()

    def begin(self, prompt: Sequence[int]) -> State:
        return self.monitor.begin(b"".join(self.vocabulary.words[token] for token in prompt))

    def advance(self, state: State, token: int) -> State | None:
        word, following = self.vocabulary.words[token], state
        if token in self.ends and self.monitor.may_end(state):
            return state
        if not word:
            return state if self.monitor.is_dormant(state) else None
        for byte in word:
            if (behind := self.monitor.advance(following, byte)) is None:
                return None
            following = behind
        return following

    def allowed(self, state: State) -> np.ndarray:
        if state in self._masks:
            self._masks.move_to_end(state)
        else:
            mask = self.vocabulary.mask(self.monitor, state)
            if self.monitor.may_end(state):
                mask[[*self.ends]] = True
            mask.flags.writeable = False
            self._masks[state] = mask
            if len(self._masks) > MOST_MASKS:
                self._masks.popitem(last=False)
        return self._masks[state]

    def release(self, state: State) -> State:
        return self.monitor.release(state)


@functools.lru_cache(maxsize=4)
def _vocabulary(words: tuple[bytes, ...]) -> Vocabulary:
    return Vocabulary(words)


def watch(lm: LanguageModel, monitor: Monitor, stop_ids: Iterable[int]) -> Watched:
    """A monitor as a constraint of a model.

    Args:
      lm: whose tokens it reads.
      monitor: what is asked.
      stop_ids: tokens that end a text, besides the model's end-of-text.

    Raises:
      ValueError: the checkpoint has no tokenizer, so that nobody knows what tokens say.
    """
    if lm.tokenizer is None:
        raise ValueError(
            "constraint is a monitor, which reads text, but the checkpoint has no tokenizer that "
            "could be read"
        )
    vocabulary = _vocabulary(token_bytes(lm.tokenizer, lm.cfg.vocab_size))
    return Watched(monitor, vocabulary, {*lm.cfg.eos_ids, *stop_ids})
