"""Tables of what follows pairs of tokens, as hash tables in arrays.

A pair has its place in one bucket of `WAYS` places; in a full one it takes the place of the pair
with the least in it.

Letters: A tables, H places, K successors, B rows, n pairs that are looked up.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.requests import token_ids

WAYS = 8


class Trigrams(struct.PyTreeNode):
    """Successors of pairs.

    Attributes:
      pairs: [A, H, 2] int32. -1: nothing is there.
      tokens: [A, H, K] int32. What has followed a pair; -1: nothing.
      values: [A, H, K] float32. How much it counts; 0 where there is nothing.
    """

    pairs: jax.Array
    tokens: jax.Array
    values: jax.Array

    def find(
        self, rows: jax.Array, pair: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Places of pairs.

        Args:
          rows: [B] int32. Which table each row has.
          pair: [B, n, 2] int32.

        Returns:
          The best place for each pair [B, n] int32, whether it is there [B, n] bool, and what is
          there then, tokens and values [B, n, K]; else nothing is.
        """
        bucket = _bucket(pair[..., 0], pair[..., 1], self.pairs.shape[1] // WAYS)
        place = bucket[..., None] * WAYS + jnp.arange(WAYS)[None, None]
        row = rows[:, None, None]
        is_it = (self.pairs[row, place] == pair[..., None, :]).all(axis=-1)
        total = self.values[row, place].sum(axis=-1)
        way = jnp.argmax(jnp.where(is_it, jnp.inf, -total), axis=-1)[..., None]
        best = jnp.take_along_axis(place, way, axis=-1)[..., 0]
        is_there = is_it.any(axis=-1)
        tokens = jnp.where(is_there[..., None], self.tokens[rows[:, None], best], -1)
        values = jnp.where(is_there[..., None], self.values[rows[:, None], best], 0)
        return best, is_there, tokens, values


def empty(num_tables: int, num_pairs: int, num_successors: int) -> Trigrams:
    """Tables of nothing; `num_pairs` is a multiple of `WAYS`."""
    entries = num_tables, num_pairs, num_successors
    return Trigrams(
        pairs=jnp.full((num_tables, num_pairs, 2), -1, jnp.int32),
        tokens=jnp.full(entries, -1, jnp.int32),
        values=jnp.zeros(entries),
    )


def look_up(own: Trigrams, corpus: Trigrams | None, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Successors of pairs [B, n, 2], tokens and values [B, n, K]: a row's own, or the corpus's.

    The one that counts most comes first, of equals the lower token; behind them there is nothing.
    """
    rows = jnp.arange(len(pair))
    _, is_there, tokens, values = own.find(rows, pair)
    if corpus is not None:
        _, _, *others = corpus.find(jnp.zeros_like(rows), pair)
        is_own = is_there[..., None]
        tokens, values = (
            jnp.where(is_own, a, b) for a, b in zip((tokens, values), others, strict=True)
        )
    least, tokens = jax.lax.sort((-values, tokens), num_keys=2)
    return tokens, -least


def add(
    own: Trigrams, corpus: Trigrams | None, trigram: jax.Array, is_new: jax.Array,
    increment: jax.Array | float, most: jax.Array | float,
) -> Trigrams:  # fmt: skip
    """The tables with one trigram [B, 3] int32 more in rows `is_new` [B] bool.

    A pair that a row meets first has what the corpus knows of it. The last token then counts
    `increment` more, and `most` at most; in a full place it stands for the one that counts least.
    """
    rows, pair, token = jnp.arange(len(trigram)), trigram[:, None, :2], trigram[:, 2:]
    place, is_there, tokens, values = own.find(rows, pair)
    if corpus is not None:
        _, _, *others = corpus.find(jnp.zeros_like(rows), pair)
        is_own = is_there[..., None]
        tokens, values = (
            jnp.where(is_own, a, b) for a, b in zip((tokens, values), others, strict=True)
        )
    place, tokens, values = place[:, 0], tokens[:, 0], values[:, 0]
    at = jnp.argmax(jnp.where(tokens == token, jnp.inf, -values), axis=1)
    is_known = tokens[rows, at] == token[:, 0]
    value = jnp.minimum(jnp.where(is_known, values[rows, at], 0) + increment, most)
    slot = jnp.where(is_new, place, own.pairs.shape[1])
    return Trigrams(
        pairs=own.pairs.at[rows, slot].set(pair[:, 0], mode="drop"),
        tokens=own.tokens.at[rows, slot].set(tokens.at[rows, at].set(token[:, 0]), mode="drop"),
        values=own.values.at[rows, slot].set(values.at[rows, at].set(value), mode="drop"),
    )


def count_trigrams(texts: Sequence[Sequence[int]], num_successors: int = 12) -> Trigrams:
    """One table (A is 1) of the most frequent successors of all pairs in texts, made on the host.

    Values are shares of all successors of a pair, those left out included.

    Args:
      texts: token ids.
      num_successors: K, of a pair.

    Raises:
      ValueError: no text has three tokens, or one of them is no id; `num_successors` is below 1.
    """
    if num_successors < 1:
        raise ValueError(f"num_successors={num_successors} must be at least 1")
    found: dict[tuple[int, int], collections.Counter[int]] = {}
    for given in texts:
        text = token_ids("texts", given)
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            found.setdefault((a, b), collections.Counter())[c] += 1
    if not found:
        raise ValueError(f"texts has {len(texts)} texts, of which none has three tokens")
    num_buckets = -(-2 * len(found) // WAYS)
    table = jax.tree.map(np.array, empty(1, num_buckets * WAYS, num_successors))
    pairs = np.array(list(found), np.int32)
    bucket = np.asarray(_bucket(jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]), num_buckets))
    counts = list(found.values())
    used = np.zeros(num_buckets, np.int32)
    for i in sorted(range(len(pairs)), key=lambda i: -counts[i].total()):
        if used[bucket[i]] == WAYS:  # the rarest pairs find no place
            continue
        place = bucket[i] * WAYS + used[bucket[i]]
        used[bucket[i]] += 1
        best = sorted(counts[i].items(), key=lambda item: (-item[1], item[0]))[:num_successors]
        table.pairs[0, place] = pairs[i]
        for k, (token, count) in enumerate(best):
            table.tokens[0, place, k] = token
            table.values[0, place, k] = count / counts[i].total()
    return jax.tree.map(jnp.asarray, table)


def _bucket(a: jax.Array, b: jax.Array, num: int) -> jax.Array:
    """A number below `num` for two tokens of any shape."""
    mixed = a.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    mixed += b.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0xC2B2AE35)
    return ((mixed ^ (mixed >> 13)) % num).astype(jnp.int32)
