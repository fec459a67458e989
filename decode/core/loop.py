"""Rounds until every row is done: one device program, or one at a time.

Both decoding loops have a state with `has_stopped` [B] bool and `num_steps`, the rounds so far, and
a pure `step` that makes one round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp

FOREVER = 2**31 - 1


class LoopState(Protocol):
    """What the loop itself looks at."""

    @property
    def has_stopped(self) -> jax.Array: ...

    @property
    def num_steps(self) -> jax.Array: ...


State = TypeVar("State", bound=LoopState)


def run(step: Callable[[State], State], state: State, max_rounds: jax.Array | int) -> State:
    """At most `max_rounds` rounds, to be called under `jax.jit`."""
    last = state.num_steps + jnp.minimum(max_rounds, FOREVER - state.num_steps)
    return jax.lax.while_loop(
        lambda state: ~state.has_stopped.all() & (state.num_steps < last), step, state
    )


def stream(step: Callable[[State], State], state: State) -> Iterator[State]:
    """Yields the state after every round of a jitted `step`, at Python's pace."""
    while not bool(state.has_stopped.all()):
        state = step(state)
        yield state
