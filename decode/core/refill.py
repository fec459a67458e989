"""Batches that stay full: rows that are done make place for the next prompts while others go on.

Rows of a batch need different numbers of forwards. A batch that ends with its slowest row computes
the others in vain; here a fixed number of rows is kept busy by two device programs, compiled once:

    run     rounds until so many rows are done (the loop itself, see `decode.core.loop`)
    swap    their results come out, the first states of as many prompts go in

Rows are independent, so every answer is the one its prompt gets alone.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm.sharding import batch_shards

GROUP = 8  # rows are swapped when an eighth of them is done: a swap is a program, too


def refill(
    num: int,
    rows: int,
    start: Callable[[Sequence[int], int], Any],
    run: Callable[[Any, int], Any],
    reported: Callable[[Any], Any],
) -> Iterator[tuple[list[int], Any]]:
    """Decodes `num` requests in so many rows.

    Args:
      num: requests; they get rows in the order in which they are numbered.
      rows: B.
      start: the state before the first round: of some requests, with so many rows.
      run: rounds of a state until so many rows are done, or fewer rounds; the state is given away.
      reported: what of a state is wanted in the end, without caches.

    Yields:
      Some finished requests, and a state that holds what is reported of them in its first rows. Its
      `num_steps` are the rounds so far, each over all rows.

    Raises:
      TypeError: the state holds something that is not per row, so that rows cannot be replaced.
    """
    queue = collections.deque(range(num))
    shards = batch_shards()
    group = -(-max(1, rows // GROUP) // shards) * shards
    axes = _row_axes(start, rows)
    every, wanted = (tuple(jax.tree.leaves(tree)) for tree in (axes, reported(axes)))
    here = [queue.popleft() for _ in range(min(rows, num))]
    state = start(here, rows)
    holds: list[int | None] = [*here, *[None] * (rows - len(here))]
    while (idle := holds.count(None)) < rows:
        state = run(state, min(rows, idle + group) if queue else rows)
        stopped = np.asarray(state.has_stopped)
        done = [b for b, request in enumerate(holds) if request is not None and stopped[b]]
        for first in range(0, len(done), group):
            places = done[first : first + group]
            lanes = jnp.array(places + [rows] * (group - len(places)), jnp.int32)
            taken = _take(wanted, rows, reported(state), lanes)
            finished = [request for b in places if (request := holds[b]) is not None]
            following = [queue.popleft() for _ in places[: len(queue)]]
            if following:
                state = _put(every, rows, state, start(following, group), lanes)
            for b, request in itertools.zip_longest(places, following):
                holds[b] = request
            yield finished, taken


@dataclasses.dataclass(frozen=True)
class _RowAxis:
    """Where the rows of an array are.

    Attributes:
      axis: -1: it has none.
      times: how often all rows follow upon each other (twice with guidance).
    """

    axis: int
    times: int = 1

    def index(self, lanes: jax.Array, rows: int) -> jax.Array:
        """[times * n]: where rows `lanes` [n] are; `rows` is none of them: beyond the end."""
        beyond = self.times * rows
        each = [jnp.where(lanes < rows, lanes + j * rows, beyond) for j in range(self.times)]
        return jnp.concatenate(each)


def _row_axes(start: Callable[[Sequence[int], int], Any], rows: int) -> Any:
    """A `_RowAxis` for every array of a state."""
    one, two = (jax.eval_shape(functools.partial(start, [0], n)) for n in (rows, 2 * rows))

    def find(path: jax.tree_util.KeyPath, a: Any, b: Any) -> _RowAxis:
        differ = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
        if not differ and jax.tree_util.keystr(path) == ".num_steps":
            return _RowAxis(-1)
        if len(differ) != 1 or a.shape[differ[0]] not in (rows, 2 * rows):
            raise TypeError(
                f"rows of a running batch cannot be replaced: state{jax.tree_util.keystr(path)} "
                f"of shape {a.shape} is not per row"
            )
        return _RowAxis(differ[0], a.shape[differ[0]] // rows)

    return jax.tree_util.tree_map_with_path(find, one, two)


@functools.partial(jax.jit, static_argnames=("axes", "rows"))
def _take(axes: tuple[_RowAxis, ...], rows: int, state: Any, lanes: jax.Array) -> Any:
    """Some rows of a state."""

    def take(x: jax.Array, at: _RowAxis) -> jax.Array:
        if at.axis < 0:
            return x
        return jnp.take(x, at.index(lanes, rows), axis=at.axis, mode="clip")

    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(take, leaves, axes))


@functools.partial(jax.jit, static_argnames=("axes", "rows"), donate_argnames=("state",))
def _put(axes: tuple[_RowAxis, ...], rows: int, state: Any, fresh: Any, lanes: jax.Array) -> Any:
    """The state with `fresh` rows in the places of `lanes`."""

    def put(x: jax.Array, new: jax.Array, at: _RowAxis) -> jax.Array:
        if at.axis < 0:
            return x
        where = (slice(None),) * at.axis + (at.index(lanes, rows),)
        return x.at[where].set(new, mode="drop")

    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(put, leaves, jax.tree.leaves(fresh), axes))
