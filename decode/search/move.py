"""The writing half of a round of search: hypotheses go where a strategy has them, rows and texts.

Letters: B prompts, K hypotheses, n candidates, G completion positions, S slots.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from decode.core.loop import of_rows
from decode.search import constrained
from decode.search.contracts import NEVER, Choice, exists, taken
from decode.search.method import SearchMethod
from decode.search.state import SearchState
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.sharding import batch_shards


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
    keep = functools.partial(of_rows, active)
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
        strategy=keep(choice.state, state.strategy),
        constraint=keep(constraint, state.constraint),
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
    """The cache of B prompts as that of B K hypotheses."""
    if K == 1:
        return cache

    def every(x: jax.Array) -> jax.Array:  # [..., B, heads, S, H]
        rows = x.shape[-4] // batch_shards()
        here = x.reshape(*x.shape[:-4], -1, 1, rows, *x.shape[-3:])
        of_each = jnp.broadcast_to(here, (*here.shape[:-5], K, *here.shape[-4:]))
        return of_each.reshape(*x.shape[:-4], -1, *x.shape[-3:])

    return jax.tree.map(every, cache)


def by_row(x: jax.Array) -> jax.Array:
    """[B, K, ...] as the rows of the cache have it, [B K, ...]: on every device the first ones come
    first, so that those are a cache of their own."""
    B, K, *rest = x.shape
    here = x.reshape(batch_shards(), -1, K, *rest)
    return here.swapaxes(1, 2).reshape(B * K, *rest)


def by_prompt(x: jax.Array, K: int) -> jax.Array:
    """The reverse of `by_row`."""
    rows, *rest = x.shape
    here = x.reshape(batch_shards(), K, -1, *rest)
    return here.swapaxes(1, 2).reshape(rows // K, K, *rest)
