"""The writing half of a round of search: hypotheses go where a strategy has them, rows and texts.

Letters: B prompts, K hypotheses, n candidates, G completion positions, S slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from decode.search import constrained
from decode.search.contracts import NEVER, Choice, exists, taken
from decode.search.method import SearchMethod
from decode.search.state import SearchState
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Apart, is_apart


def write(
    cfg: ModelConfig,
    method: SearchMethod,
    state: SearchState,
    choice: Choice,
    source: jax.Array,
) -> SearchState:
    """The texts of the next round.

    A hypothesis whose token may not be written is dead, and `NEVER` its score. A prompt without any
    other is done, and nothing is written.
    """
    (B, K, S), is_ahead = state.tokens.shape, method.strategy.looks_ahead
    G = state.log_prob.shape[2]
    rows, lanes = jnp.arange(B)[:, None], jnp.arange(K)[None]
    active = ~state.has_stopped
    is_written = active[:, None] & (choice.token >= 0)
    longer = state.length + is_written.any(axis=1)
    length = longer if choice.length is None else choice.length
    length = jnp.where(active, length, state.length)
    num_cached = jnp.where(active, length - (not is_ahead), state.num_cached)
    is_dead, constraint = is_written & ~exists(choice.log_prob), state.constraint
    if constraint is not None:
        accepted, constraint = constrained.follow(
            cfg, method, state, source, choice.node, choice.candidates, num_cached
        )
        if not is_ahead:  # what is read next is what is written
            is_dead |= is_written & ~accepted[:, :, 0]
    is_dead |= ~exists(choice.score)
    is_stuck = is_dead.all(axis=1)
    is_written &= ~is_stuck[:, None]
    at = jnp.where(is_written, state.length[:, None], S)
    place = jnp.where(is_written, (state.length - state.prompt_len)[:, None], G)
    tokens = taken(state.tokens, source).at[rows, lanes, at].set(choice.token, mode="drop")
    log_prob = taken(state.log_prob, source)
    log_prob = log_prob.at[rows, lanes, place].set(choice.log_prob, mode="drop")
    occurred = state.occurred
    if occurred is not None and method.strategy.takes_back:
        occurred = that_occur(tokens, length, occurred.shape[2])
    elif occurred is not None:
        token = jnp.where(is_written, choice.token, occurred.shape[2])
        occurred = taken(occurred, source).at[rows, lanes, token].set(True, mode="drop")
    keep = lambda new, old: jnp.where(  # noqa: E731
        active.reshape(-1, *[1] * (new.ndim - 1)), new, old
    )
    return state.replace(
        tokens=tokens,
        length=jnp.where(is_stuck, state.length, length),
        num_cached=num_cached,
        candidates=keep(choice.candidates, state.candidates),
        score=keep(jnp.where(is_dead, NEVER, choice.score), state.score),
        log_prob=log_prob,
        num_forwards=state.num_forwards + active,
        has_stopped=state.has_stopped | choice.is_done | is_stuck | (length >= state.end),
        occurred=occurred,
        strategy=jax.tree.map(keep, choice.state, state.strategy),
        constraint=jax.tree.map(keep, constraint, state.constraint),
        num_steps=state.num_steps + 1,
    )


def that_occur(tokens: jax.Array, length: jax.Array, V: int) -> jax.Array:
    """[B, K, V] bool: tokens that come up in texts [B, K, S] of lengths [B]."""
    B, K, S = tokens.shape
    is_text = jnp.arange(S)[None] < length[:, None]
    found = jnp.where(is_text[:, None], tokens, V)
    rows, lanes = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    return jnp.zeros((B, K, V), bool).at[rows, lanes, found].set(True, mode="drop")


def under_all(cache: KVCache, K: int) -> KVCache:
    """The cache of B prompts as that of K B hypotheses."""
    if K == 1:
        return cache
    return jax.tree.map(lambda x: jnp.concatenate([x] * K, axis=x.ndim - 4), cache)


def move(
    cache: KVCache, source: jax.Array, first: jax.Array, num_slots: int
) -> tuple[KVCache, jax.Array]:
    """Copies what stands behind prompts, from rows of sources to rows that they are to be.

    A source stays where it is, as `staying` has it, so nothing is read that was overwritten.

    Args:
      cache: of K B rows.
      source: [B, K] int32.
      first: [B] int32. The first slot that differs.
      num_slots: behind it that may.

    Returns:
      The cache, and how many were copied, [B] int32.
    """
    B, K = source.shape
    is_moved = source != jnp.arange(K)[None]
    if K == 1:
        return cache, jnp.zeros(B, jnp.int32)
    order = jnp.argsort(~is_moved.reshape(-1), stable=True)
    num_slots = min(num_slots, cache.num_slots)
    first = jnp.minimum(first, cache.num_slots - num_slots)

    def copy(i: jax.Array, cache: KVCache) -> KVCache:
        b, k = order[i] // K, order[i] % K
        old, new = source[b, k] * B + b, k * B + b

        def one(x: jax.Array) -> jax.Array:  # [..., K B, heads, S, H]
            lead = x.ndim - 4
            at = lambda row: (0,) * lead + (row, 0, first[b], 0)  # noqa: E731
            size = (*x.shape[:lead], 1, x.shape[-3], num_slots, x.shape[-1])
            taken = jax.lax.dynamic_slice(x, at(old), size)
            return jax.lax.dynamic_update_slice(x, taken, at(new))

        def every(x: jax.Array | Apart) -> jax.Array | Apart:
            return Apart(tuple(map(one, x.layers))) if isinstance(x, Apart) else one(x)

        return jax.tree.map(every, cache, is_leaf=is_apart)

    cache = jax.lax.fori_loop(0, is_moved.sum(), copy, cache)
    return cache, is_moved.sum(axis=1, dtype=jnp.int32)


def by_row(x: jax.Array) -> jax.Array:
    """[B, K] as the rows of the cache have it, [K B]."""
    return x.swapaxes(0, 1).reshape(-1)
