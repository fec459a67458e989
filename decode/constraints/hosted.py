"""What must run on the host: constraints that cannot be traced, between jitted halves of a round.

A constraint knows one state per text. States never change: `advance` makes another one, so texts
that begin alike share theirs, and what was drafted and is rejected leaves nothing behind. A state
follows from the tokens of its text and how many of them were given, so a row of a batch, which may
get another text at any time, is found by what it holds.

A round of draft and verify (`decode.speculative.hosted`) has three parts; a search
(`decode.search.hosted`) knows what is allowed before it judges, and needs one program:

    judge    jitted: the forward, and what would be written
    check    on the host: is it allowed? Only where it is not, a mask goes to the device
    apply    jitted: chooses again where there is a mask, and writes

Letters: V vocabulary, n masks.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.results import Completion
from decode.core.sampling import Sampling
from decode.core.texts import Loop, of_params

State = Hashable
MOST_KEPT = 1024  # texts whose states are remembered


class HostConstraint:
    """Which tokens may follow a text? Inherit from it and say what the four methods do."""

    def begin(self, prompt: Sequence[int]) -> State:
        """The state behind a prompt."""
        raise NotImplementedError

    def advance(self, state: State, token: int) -> State | None:
        """The state behind one token more; None: it is not allowed."""
        raise NotImplementedError

    def allowed(self, state: State) -> np.ndarray:
        """[V] bool: the tokens that `advance` allows. Not to be written to."""
        raise NotImplementedError

    def release(self, state: State) -> State:
        """The state where none is allowed, with nothing asked of what follows."""
        raise NotImplementedError


class Follower:
    """The states of the texts of a batch.

    Attributes:
      constraint: says what is allowed.
      never: [V] bool. Tokens that are ruled out beside it; None: none are.
    """

    def __init__(self, constraint: HostConstraint, never: np.ndarray | None = None) -> None:
        self.constraint = constraint
        self.never = never
        self._known: collections.OrderedDict[tuple[int, bytes], State] = collections.OrderedDict()

    def state_of(self, tokens: np.ndarray, prompt_len: int) -> State:
        """The state of a text [n] int32 whose first `prompt_len` tokens were given."""
        if (key := (prompt_len, tokens.tobytes())) not in self._known:
            before = prompt_len, tokens[:-1].tobytes()
            if len(tokens) > prompt_len and before in self._known:
                state = self.follow(self._known[before], int(tokens[-1]))
            else:
                state = self.constraint.begin(tokens[:prompt_len].tolist())
                for token in tokens[prompt_len:].tolist():
                    state = self.follow(state, token)
            self.remember(tokens, prompt_len, state)
        return self._known[key]

    def remember(self, tokens: np.ndarray, prompt_len: int, state: State) -> None:
        """Keeps the state of a text, as `state_of` has it, for when it is asked for."""
        self._known[prompt_len, tokens.tobytes()] = state
        if len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)

    def follow(self, state: State, token: int) -> State:
        """The state behind a token that was written, whether it was allowed or not."""
        following = self.constraint.advance(state, token)
        if following is None:  # as nothing was, or it was given
            released = self.constraint.release(state)
            following = self.constraint.advance(released, token)
            return released if following is None else following
        return following

    def mask(self, state: State) -> np.ndarray:
        """[V] bool: what may follow; nothing if the state must be released."""
        allowed = self.constraint.allowed(state)
        return allowed if self.never is None else allowed & ~self.never

    def open(self, state: State) -> tuple[State, np.ndarray]:
        """A state in which something is allowed, the same one if there is, and what that is."""
        mask = self.mask(state)
        if mask.any():
            return state, mask
        state = self.constraint.release(state)
        mask = self.mask(state)
        return state, mask if mask.any() else np.ones_like(mask)


def follow(constraint: HostConstraint, sampling: Sampling) -> Follower:
    """What follows texts: tokens with a logit bias of -inf are never among those allowed."""
    bias = sampling.logit_bias
    return Follower(constraint, None if bias is None else np.isneginf(np.asarray(bias)))


class Masks(struct.PyTreeNode):
    """Masks for some places, as they are sent to the device.

    Attributes:
      row: [n] int32. Of the batch; past its end: nothing is masked.
      place: [n] int32. A node of the row's tree, or one of its hypotheses.
      allowed: [n, V] bool.
    """

    row: jax.Array
    place: jax.Array
    allowed: jax.Array

    def spread(self, rows: int, places: int) -> jax.Array:
        """[rows, places, V] bool: True where there is no mask."""
        every = jnp.ones((rows, places, self.allowed.shape[1]), bool)
        return every.at[self.row, self.place].set(self.allowed, mode="drop")


def pack(found: Sequence[tuple[int, int, np.ndarray]]) -> Masks | None:
    """Masks (row, place, [V] bool), filled up to a power of four so that few programs are made."""
    if not found:
        return None
    n, V = 1, len(found[0][2])
    while n < len(found):
        n *= 4
    row, place = np.full(n, np.iinfo(np.int32).max, np.int32), np.zeros(n, np.int32)
    allowed = np.ones((n, V), bool)
    for i, (b, k, mask) in enumerate(found):
        row[i], place[i], allowed[i] = b, k, mask
    return Masks(jnp.asarray(row), jnp.asarray(place), jnp.asarray(allowed))


def on_host(loop: Loop, prepare: Callable[..., Any], decode: Callable[..., Any]) -> Loop:
    """A loop that is asked as `loop`, with a constraint in its rounds.

    Args:
      loop: the one without.
      prepare: the state before the first round, see `decode.core.texts.of_params`.
      decode: rounds of it.
    """
    return dataclasses.replace(
        loop, prepare=of_params(prepare), decode=decode, collect=_counted(loop.collect)
    )


def _counted(collect: Callable[..., list[Completion]]) -> Callable[..., list[Completion]]:
    """A loop's `collect` whose `Completion.counts` say what the constraint did, too.

    "num_masked" are rounds in which it ruled out what would have been written, or anything at all
    of searches and filters; "num_released" says how often it allowed nothing, and was released.
    """

    def with_counts(state: Any, *asked: Any, **options: Any) -> list[Completion]:
        masked, released = jax.device_get((state.num_masked, state.num_released))
        own = [
            {"num_masked": int(m), "num_released": int(r)}
            for m, r in zip(masked, released, strict=True)
        ]
        return [
            dataclasses.replace(completion, counts={**completion.counts, **counts})
            for completion, counts in zip(collect(state, *asked, **options), own, strict=False)
        ]

    return with_counts
