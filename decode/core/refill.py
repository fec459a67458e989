"""Batches that stay full: rows that are done make place for the next prompts while others go on.

Rows of a batch need different numbers of forwards. A batch that ends with its slowest row computes
the others in vain; here a fixed number of rows is kept busy by two device programs, compiled once:

    run     rounds until so many rows are done (the loop itself, see `decode.core.loop`)
    swap    their results come out, the first states of as many prompts go in

Rows are independent, so every answer is the one its prompt gets alone.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

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
      `num_steps` are the rounds so far, each over all rows. Meanwhile the device goes on.

    Raises:
      TypeError: the state holds something that is not per row, so that rows cannot be replaced.
    """
    queue = collections.deque(range(num))
    here = [queue.popleft() for _ in range(min(rows, num))]
    state = start(here, rows)
    every, wanted = _row_axes(state, start, rows, reported)
    holds: list[int | None] = [*here, *[None] * (rows - len(here))]
    finished: list[tuple[list[int], Any]] = []
    group = _group(rows)
    while (idle := holds.count(None)) < rows:
        state = run(state, min(rows, idle + group))
        yield from finished
        finished = []
        stopped = np.asarray(state.has_stopped)
        done = [b for b, request in enumerate(holds) if request is not None and stopped[b]]
        size = rows if 2 * len(done) > rows else group
        for first in range(0, len(done), size):
            places = done[first : first + size]
            lanes = np.array(places + [rows] * (size - len(places)), np.int32)
            taken = _take(wanted, rows, reported(state), lanes)
            finished.append(([i for b in places if (i := holds[b]) is not None], taken))
            following = [queue.popleft() for _ in places[: len(queue)]]
            if following:
                state = _put(every, rows, state, start(following, size), lanes)
            for b, request in itertools.zip_longest(places, following):
                holds[b] = request
    yield from finished


def warm_up(
    rows: int,
    state: Any,
    start: Callable[[Sequence[int], int], Any],
    reported: Callable[[Any], Any],
) -> None:
    """Compiles what `refill` needs to swap rows of a state, which is given away."""
    every, wanted = _row_axes(state, start, rows, reported)
    for size in {_group(rows), rows}:
        lanes = np.full(size, rows, np.int32)
        _take(wanted, rows, reported(state), lanes)
        state = _put(every, rows, state, start([0], size), lanes)


def _group(rows: int) -> int:
    """So many rows are waited for: as many for every device of the mesh in use."""
    shards = batch_shards()
    return -(-max(1, rows // GROUP) // shards) * shards


@dataclasses.dataclass(frozen=True)
class _RowAxis:
    """Where the rows of an array are.

    Attributes:
      axis: -1: it has none.
      times: how often each row is there: twice with guidance, in a search as often as there are
        hypotheses. All rows follow upon each other so often,
      is_by_device: or those of each device do, if the batch is split.
    """

    axis: int
    times: int = 1
    is_by_device: bool = False

    def index(self, lanes: jax.Array, rows: int) -> jax.Array:
        """[times * n]: where rows `lanes` [n] are; `rows` is none of them: beyond the end."""
        shards = batch_shards() if self.is_by_device else 1
        here, lanes = rows // shards, lanes.reshape(shards, 1, -1)
        nth = jnp.arange(self.times)[None, :, None]
        at = lanes // here * (self.times * here) + nth * here + lanes % here
        return jnp.where(lanes < rows, at, self.times * rows).reshape(-1)


def _row_axes(
    state: Any,
    start: Callable[[Sequence[int], int], Any],
    rows: int,
    reported: Callable[[Any], Any],
) -> tuple[tuple[_RowAxis, ...], tuple[_RowAxis, ...]]:
    """Of every array of a state, and of every one that is reported."""
    twice = jax.eval_shape(functools.partial(start, [0], 2 * rows))
    is_by_device = getattr(state, "rows_are_by_device", False)

    def find(path: jax.tree_util.KeyPath, a: Any, b: Any) -> _RowAxis:
        differ = [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
        if not differ and jax.tree_util.keystr(path) == ".num_steps":
            return _RowAxis(-1)
        if len(differ) != 1 or a.shape[differ[0]] % rows:
            raise TypeError(
                f"rows of a running batch cannot be replaced: state{jax.tree_util.keystr(path)} "
                f"of shape {a.shape} is not per row"
            )
        return _RowAxis(differ[0], a.shape[differ[0]] // rows, is_by_device)

    axes = jax.tree_util.tree_map_with_path(find, state, twice)
    return tuple(jax.tree.leaves(axes)), tuple(jax.tree.leaves(reported(axes)))


@functools.partial(jax.jit, static_argnames=("axes", "rows"))
def _take(axes: tuple[_RowAxis, ...], rows: int, state: Any, lanes: jax.Array) -> Any:
    """Some rows of a state."""

    def take(x: jax.Array, at: _RowAxis) -> jax.Array:
        if at.axis < 0:
            return jnp.copy(x)  # the state's own is given away
        return jnp.take(x, at.index(lanes, rows), axis=at.axis, mode="clip")

    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, map(take, leaves, axes))


def _put(axes: tuple[_RowAxis, ...], rows: int, state: Any, fresh: Any, lanes: np.ndarray) -> Any:
    """The state with `fresh` rows in the places of `lanes`: a program for each set of devices."""
    leaves, structure = jax.tree.flatten(state)
    new = jax.tree.leaves(fresh)
    together = collections.defaultdict(list)
    for i, x in enumerate(leaves):
        together[frozenset(x.sharding.device_set)].append(i)
    for some in together.values():
        every, at = (tuple(x[i] for i in some) for x in (axes, leaves, new)), leaves[some[0]]
        mesh: Any = at.sharding.mesh if isinstance(at.sharding, NamedSharding) else None
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            changed = _put_some(*every, lanes, rows)
        for i, x in zip(some, changed, strict=True):
            leaves[i] = x
    return jax.tree.unflatten(structure, leaves)


@functools.partial(jax.jit, static_argnames=("axes", "rows"), donate_argnames=("leaves",))
def _put_some(
    axes: tuple[_RowAxis, ...],
    leaves: tuple[jax.Array, ...],
    fresh: tuple[jax.Array, ...],
    lanes: jax.Array,
    rows: int,
) -> tuple[jax.Array, ...]:
    """`_put` of arrays on the same devices."""

    def put(x: jax.Array, new: jax.Array, at: _RowAxis) -> jax.Array:
        if at.axis < 0:
            return x
        where = (slice(None),) * at.axis + (at.index(lanes, rows),)
        return x.at[where].set(new, mode="drop")

    return tuple(map(put, leaves, fresh, axes))
