"""Several monitors at once."""

from __future__ import annotations

import dataclasses

from decode.constraints.monitors.contracts import Monitor, State


@dataclasses.dataclass(frozen=True, eq=False)
class JointMonitor(Monitor):
    """What all of some monitors allow: the intersection of their masks.

    Where they have nothing in common all of them are released.

    Reference: Agrawal et al., arXiv:2306.10763, Sec. 3 (joint monitoring).

    Attributes:
      monitors: at least one.
    """

    monitors: tuple[Monitor, ...]

    def __post_init__(self) -> None:
        if not self.monitors:
            raise ValueError("monitors=() must have at least one")

    @property
    def wakes_at(self) -> frozenset[int]:
        return frozenset[int]().union(*(monitor.wakes_at for monitor in self.monitors))

    def start(self) -> State:
        return tuple(monitor.start() for monitor in self.monitors)

    def begin(self, prompt: bytes) -> State:
        return tuple(monitor.begin(prompt) for monitor in self.monitors)

    def advance(self, state: State, byte: int) -> State | None:
        following = []
        for monitor, own in self._pairs(state):
            if (behind := monitor.advance(own, byte)) is None:
                return None
            following.append(behind)
        return tuple(following)

    def is_dormant(self, state: State) -> bool:
        return all(monitor.is_dormant(own) for monitor, own in self._pairs(state))

    def may_end(self, state: State) -> bool:
        return all(monitor.may_end(own) for monitor, own in self._pairs(state))

    def release(self, state: State) -> State:
        return tuple(monitor.release(own) for monitor, own in self._pairs(state))

    def _pairs(self, state: State) -> list[tuple[Monitor, State]]:
        assert isinstance(state, tuple)
        return list(zip(self.monitors, state, strict=True))
