"""Behind a dot only members of what stands before it, by a table of types."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from decode.constraints.monitors.contracts import PYTHON_BREAKS, Monitor, State

_CHAIN = re.compile(rb"[A-Za-z0-9_.\x80-\xff]*\Z")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Where a monitor is.

    Attributes:
      text: what it remembers of the text.
      left: of legal names what is not written yet; None: it is dormant.
    """

    text: bytes
    left: frozenset[bytes] | None = None


class Dereference(Monitor):
    """Wakes behind a dot, and has one of the names that `analyse` finds written there.

    Where it finds none, or more than `max_names`, it stays dormant: what is not known is no reason
    to forbid anything. A name ends with one of the `breaks`; spaces are among them, so that none
    stands between a dot and a name.

    Attributes:
      breaks: bytes that end a name.
      max_names: most names it looks at.
    """

    breaks: frozenset[int] = PYTHON_BREAKS
    max_names: int = 2000

    def keep(self, text: bytes) -> bytes:
        """What must be remembered of a text. Default: all of it."""
        return text

    def pre(self, text: bytes) -> bool:
        """Whether to analyse here: behind a dot."""
        return text.endswith(b".")

    def analyse(self, text: bytes) -> Iterable[bytes]:
        """Legal names behind a text that ends with a dot."""
        raise NotImplementedError

    @property
    def wakes_at(self) -> frozenset[int]:
        return frozenset(b".")

    def start(self) -> Reading:
        return Reading(b"")

    def begin(self, prompt: bytes) -> State:
        # Names that are whole do not matter, whether they were legal or not.
        first = len(prompt)
        while first and prompt[first - 1] not in self.breaks:
            first -= 1
        reading = self._wake(self.keep(prompt[:first]))
        for byte in prompt[first:]:
            following = self.advance(reading, byte)
            if following is None:
                following = Reading(self.keep(reading.text + bytes([byte])))
            reading = following
        return reading

    def advance(self, state: State, byte: int) -> Reading | None:
        assert isinstance(state, Reading)
        text = self.keep(state.text + bytes([byte]))
        if byte in self.breaks:
            if state.left is not None and b"" not in state.left:
                return None
            return self._wake(text)
        if state.left is None:
            return Reading(text)
        left = frozenset(name[1:] for name in state.left if name[:1] == bytes([byte]))
        return Reading(text, left) if left else None

    def is_dormant(self, state: State) -> bool:
        assert isinstance(state, Reading)
        return state.left is None

    def may_end(self, state: State) -> bool:
        assert isinstance(state, Reading)
        return state.left is None or b"" in state.left

    def release(self, state: State) -> Reading:
        assert isinstance(state, Reading)
        return Reading(state.text)

    def _wake(self, text: bytes) -> Reading:
        names = frozenset(self.analyse(text)) if self.pre(text) else frozenset()
        return Reading(text, names if 0 < len(names) <= self.max_names else None)


@dataclasses.dataclass(frozen=True, eq=False)
class IntrospectionMonitor(Dereference):
    """Members by a symbol table and the types of variables, which are both given.

    Example:
      >>> monitor = IntrospectionMonitor({"Point": ["x", "y"]}, {"p": "Point", "line.end": "Point"})
      >>> complete(lm, "p = line.end\nprint(p.", constraint=monitor)

    What stands before a dot is looked up as it is written, dots and all, in `variables`.

    Reference: Agrawal et al., arXiv:2306.10763, Sec. 3, with a given table in the place of a
    language server.

    Attributes:
      members: of each type, its names.
      variables: of each name or chain of names, its type.
      breaks: bytes that end a name.
      max_names: >= 1, most names of a type: of those that have more nothing is asked.
    """

    members: Mapping[str, Iterable[str]]
    variables: Mapping[str, str]
    breaks: frozenset[int] = PYTHON_BREAKS
    max_names: int = 2000

    def __post_init__(self) -> None:
        if self.max_names < 1:
            raise ValueError(f"max_names={self.max_names} must be at least 1")
        for name, kind in self.variables.items():
            if kind not in self.members:
                raise ValueError(f"variables[{name!r}]={kind!r} must be a type of members")
        # What can be gone through once only is kept.
        members = {kind: tuple(names) for kind, names in self.members.items()}
        object.__setattr__(self, "members", members)
        for kind, names in members.items():
            for name in names:
                if not name or self.breaks & set(name.encode()):
                    raise ValueError(
                        f"members[{kind!r}] has {name!r}, which must be a name without any of the "
                        "bytes that end one"
                    )

    def keep(self, text: bytes) -> bytes:
        """The names and dots at the end."""
        found = _CHAIN.search(text)
        assert found is not None
        return found[0]

    def analyse(self, text: bytes) -> Iterable[bytes]:
        kind = self.variables.get(text[:-1].decode(errors="replace"))
        return () if kind is None else (name.encode() for name in self.members[kind])
