"""What a finite automaton over bytes allows: enumerations, protocols of objects, small formats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from decode.constraints.monitors.contracts import PYTHON_BREAKS, Monitor, State


@dataclasses.dataclass(frozen=True)
class Automaton:
    """A deterministic automaton over the bytes of an item.

    Attributes:
      edges: state -> byte -> state.
      accepting: states in which an item is whole.
      start: the state in which the first item begins.
      resumes: accepting state -> the one in which the next item begins; others: `start`.
    """

    edges: Mapping[int, Mapping[int, int]]
    accepting: frozenset[int]
    start: int = 0
    resumes: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def words(cls, words: Iterable[str]) -> Automaton:
        """One of some words, such as the members of an enumeration."""
        return cls.protocol({"": {word: "" for word in words}}, "")

    @classmethod
    def protocol(cls, calls: Mapping[str, Mapping[str, str]], start: str) -> Automaton:
        """The methods that an object allows, by what was called before (a typestate).

        Example:
          >>> calls = {"new": {"open": "open"}, "open": {"read": "open", "close": "closed"}}
          >>> Automaton.protocol(calls, "new")

        Args:
          calls: state of the object -> method -> state behind it. Of a state that is not there
            nothing is known, and everything allowed.
          start: the first state of the object.
        """
        every = [
            start,
            *calls,
            *(after for methods in calls.values() for after in methods.values()),
        ]
        names = {name: i for i, name in enumerate(dict.fromkeys(every))}
        edges: dict[int, dict[int, int]] = {}
        accepting, resumes, num = set[int](), dict[int, int](), len(names)
        for name, methods in calls.items():
            for method, after in methods.items():
                if not method:
                    raise ValueError(f"calls[{name!r}] has an empty method: leave it out")
                at = names[name]
                for byte in method.encode():
                    if byte not in (out := edges.setdefault(at, {})):
                        out[byte] = num
                        num += 1
                    at = out[byte]
                accepting.add(at)
                resumes[at] = names[after]
        return cls(edges, frozenset(accepting), 0, resumes)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a monitor is.

    Attributes:
      tail: the last bytes, as many as may be a beginning of the trigger.
      at: the automaton's state; None: the monitor is dormant.
      following: the state in which the next item begins.
    """

    tail: bytes
    at: int | None
    following: int


@dataclasses.dataclass(frozen=True, eq=False)
class AutomatonMonitor(Monitor):
    """Behind a trigger, only what a finite automaton accepts.

    Example:
      >>> colors = AutomatonMonitor(Automaton.words(["RED", "GREEN"]), "Color.")
      >>> complete(lm, "paint = Color.", constraint=colors)

    An item ends where it is whole and one of `breaks` follows that does not belong to it. Where the
    automaton allows nothing from the beginning, the monitor stays dormant.

    Reference: Agrawal et al., arXiv:2306.10763, Sec. 3 (enumerations and typestate).

    Attributes:
      automaton: the language of items.
      trigger: text that wakes the monitor; "": it is awake from the first byte that is written, and
        all of the answer is one item.
      breaks: bytes that end an item.
    """

    automaton: Automaton
    trigger: str
    breaks: frozenset[int] = PYTHON_BREAKS

    @property
    def _mark(self) -> bytes:
        return self.trigger.encode()

    @property
    def wakes_at(self) -> frozenset[int]:
        return frozenset(self._mark[-1:])

    def start(self) -> Run:
        first = self.automaton.start
        return Run(b"", None if self.trigger else first, first)

    def begin(self, prompt: bytes) -> State:
        return super().begin(prompt) if self.trigger else self.start()

    def advance(self, state: State, byte: int) -> Run | None:
        assert isinstance(state, Run)
        at, following, edges = state.at, state.following, self.automaton.edges
        if at is not None:
            if (further := edges.get(at, {}).get(byte)) is not None:
                return dataclasses.replace(self._read(state, byte), at=further)
            if not self.trigger or at not in self.automaton.accepting or byte not in self.breaks:
                return None
            following = self.automaton.resumes.get(at, self.automaton.start)
        run = dataclasses.replace(self._read(state, byte), at=None, following=following)
        if run.tail == self._mark and self._mark and edges.get(following):
            run = dataclasses.replace(run, at=following)
        return run

    def is_dormant(self, state: State) -> bool:
        assert isinstance(state, Run)
        return state.at is None

    def may_end(self, state: State) -> bool:
        assert isinstance(state, Run)
        return state.at is None or state.at in self.automaton.accepting

    def release(self, state: State) -> Run:
        assert isinstance(state, Run)
        return dataclasses.replace(state, at=None)

    def _read(self, run: Run, byte: int) -> Run:
        """With the tail behind one byte more."""
        tail = (run.tail + bytes([byte]))[-len(self._mark) :] if self._mark else b""
        return dataclasses.replace(run, tail=tail)
