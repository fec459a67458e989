"""Rounds until every row is done: one device program, or one at a time.

Both decoding loops have a state with `has_stopped` [B] bool and `num_steps`, the rounds so far, and
a pure `step` that makes one round.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from dlm.config import ModelConfig
from dlm.params import Params

FOREVER = 2**31 - 1


class LoopState(Protocol):
    """What the loop itself looks at."""

    @property
    def has_stopped(self) -> jax.Array: ...

    @property
    def num_steps(self) -> jax.Array: ...


State = TypeVar("State", bound=LoopState)
Method = TypeVar("Method")
Tree = TypeVar("Tree")  # of arrays
Step = Callable[[Params, ModelConfig, Method, State], State]


def compile_decode(step: Step[Method, State]) -> jax.stages.Wrapped:
    """The jitted loop around a `step`; compiles once per model, method structure and shapes."""

    @functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
    def decode(
        params: Params,
        cfg: ModelConfig,
        method: Method,
        state: State,
        max_rounds: jax.Array | int = FOREVER,
        max_done: jax.Array | int = FOREVER,
    ) -> State:
        """Runs rounds until every row is done: one device program, no host in between.

        Compiles once per model, method structure and shapes. The state is donated.

        Args:
          params, cfg: the model.
          method: how to decode.
          state: before the first round, or of an earlier call.
          max_rounds: to return after so many, whoever is not done.
          max_done: to return when so many rows are done.
        """
        last = state.num_steps + jnp.minimum(max_rounds, FOREVER - state.num_steps)
        return jax.lax.while_loop(
            lambda state: (
                (state.has_stopped.sum() < jnp.minimum(max_done, state.has_stopped.size))
                & (state.num_steps < last)
            ),
            lambda state: step(params, cfg, method, state),
            state,
        )

    return decode


def in_place(is_so: jax.Array, change: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """`change(tree)` if `is_so` [] bool, else `tree`: a conditional that copies nothing.

    Several branches of a `jax.lax.switch` that write into a cache have XLA copy it, whichever is
    taken. A loop that runs once, or never, for each of them writes where the cache is.
    """

    def once(carry: tuple[jax.Array, Tree]) -> tuple[jax.Array, Tree]:
        return jnp.zeros_like(is_so), change(carry[1])

    _, tree = jax.lax.while_loop(lambda carry: carry[0], once, (is_so, tree))
    return tree


def of_rows(rows: jax.Array, new: Tree, old: Tree) -> Tree:
    """`new` in those `rows` [B] bool, `old` in the others; leaves are [B, ...]."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    chosen: Tree = jax.tree.map(choose, new, old)
    return chosen


def compile_step(step: Step[Method, State]) -> jax.stages.Wrapped:
    """One round, jitted; the state is donated."""
    return jax.jit(step, static_argnames=("cfg",), donate_argnames=("state",))


def stream(
    step: jax.stages.Wrapped, params: Params, cfg: ModelConfig, method: Any, state: State
) -> Iterator[State]:
    """Yields the state after every round of a compiled `step`, at Python's pace."""
    while not bool(state.has_stopped.all()):
        state = step(params, cfg, method, state)
        yield state
