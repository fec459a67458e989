"""Suffix automata: all that a text contains, by states, read and extended token by token.

A state stands for the strings that end at the same places of a text. An edge leads from the strings
of a state to those that are one token longer; the suffix link to the state of the longest of their
suffixes that ends at more places. A text of n tokens has at most 2 n states and 3 n edges, and
reading it takes a number of operations that grows with n.

Reference: Blumer et al., "The Smallest Automaton Recognizing the Subwords of a Text", Theoretical
Computer Science 40 (1985); as drafts, Hu et al., "SAM Decoding: Speculative Decoding via Suffix
Automaton", arXiv:2411.10666.

Letters: A automata, N states, E edges, V vocabulary, B rows, M tokens of a corpus.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.requests import token_ids


class Automaton(struct.PyTreeNode):
    """States by number, of which 0 is the root, the empty string; edges from 1 on, 0: none.

    Attributes:
      length: [A, N] int32. Tokens of a state's longest string.
      link: [A, N] int32. Suffix links; the root's is itself.
      end: [A, N] int32. Where the strings of a state first end.
      root: [A, V] int32. Where the root's edges lead, by token; 0: there is none.
      first: [A, N] int32. Of all other states, the first edge.
      token: [A, E] int32. Of an edge.
      to: [A, E] int32. The state that it leads to.
      following: [A, E] int32. The next edge of the same state.
    """

    length: jax.Array
    link: jax.Array
    end: jax.Array
    root: jax.Array
    first: jax.Array
    token: jax.Array
    to: jax.Array
    following: jax.Array

    def find(
        self, rows: jax.Array, state: jax.Array, token: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Where the edges with tokens [B] of states [B] of automata `rows` [B] lead, and they."""

        def is_other(edge: jax.Array) -> jax.Array:
            return (edge > 0) & (self.token[rows, edge] != token)

        edge = jax.lax.while_loop(
            lambda edge: is_other(edge).any(),
            lambda edge: jnp.where(is_other(edge), self.following[rows, edge], edge),
            jnp.where(state > 0, self.first[rows, state], 0),
        )
        return jnp.where(state > 0, self.to[rows, edge], self.root[rows, token]), edge


# What loops carry: automata, numbers [B], and last the rows, or the edges, that go on.
_Added = tuple[Automaton, jax.Array, jax.Array, jax.Array, jax.Array]
_Copied = tuple[Automaton, jax.Array, jax.Array]
_Redirected = tuple[Automaton, jax.Array, jax.Array, jax.Array]
_Shortened = tuple[jax.Array, jax.Array, jax.Array]


class Growing(struct.PyTreeNode):
    """An automaton per row, of the text so far.

    Attributes:
      automaton: A is B.
      num_states: [B] int32. States but for the root.
      num_edges: [B] int32. Edges but for the root's.
      last: [B] int32. The state of the whole text.
      num_read: [B] int32. Tokens of it.
    """

    automaton: Automaton
    num_states: jax.Array
    num_edges: jax.Array
    last: jax.Array
    num_read: jax.Array


class Corpus(struct.PyTreeNode):
    """Texts and their common automaton.

    Attributes:
      tokens: [M] int32. One text behind the other; -1 between them.
      automaton: A is 1.
    """

    tokens: jax.Array
    automaton: Automaton


def empty(batch_size: int, num_slots: int, vocab_size: int) -> Growing:
    """Of no text; with room for `num_slots` tokens each."""
    zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.int32)  # noqa: E731
    N, E = 2 * num_slots + 1, 3 * num_slots + 1
    automaton = Automaton(
        length=zeros(N), link=zeros(N), end=zeros(N), root=zeros(vocab_size), first=zeros(N),
        token=zeros(E), to=zeros(E), following=zeros(E),
    )  # fmt: skip
    return Growing(automaton, zeros(), zeros(), zeros(), zeros())


def extend(growing: Growing, token: jax.Array, is_read: jax.Array) -> Growing:
    """The automata with tokens [B] behind the texts of rows that `is_read` [B] bool."""
    rows = jnp.arange(len(token))
    new = growing.num_states + 1
    a = growing.automaton

    def put(x: jax.Array, index: jax.Array, value: jax.Array, when: jax.Array) -> jax.Array:
        return x.at[rows, jnp.where(when, index, x.shape[1])].set(value, mode="drop")

    def add_edge(
        a: Automaton, edge: jax.Array, source: jax.Array, token: jax.Array, to: jax.Array,
        when: jax.Array,
    ) -> Automaton:  # fmt: skip
        return a.replace(
            token=put(a.token, edge, token, when),
            to=put(a.to, edge, to, when),
            following=put(a.following, edge, a.first[rows, source], when),
            first=put(a.first, source, edge, when),
        )

    a = a.replace(
        length=put(a.length, new, a.length[rows, growing.last] + 1, is_read),
        end=put(a.end, new, growing.num_read, is_read),
    )

    # -- Suffixes that nobody has seen before the token: an edge each, up to one with an edge.
    def add(carry: _Added) -> _Added:
        a, num_edges, state, found, going = carry
        is_root = state == 0
        a = add_edge(a, num_edges + 1, state, token, new, going & ~is_root)
        a = a.replace(root=put(a.root, token, new, going & is_root))
        num_edges += going & ~is_root
        going &= ~is_root
        state = jnp.where(going, a.link[rows, state], state)
        target = a.find(rows, state, token)[0]
        found = jnp.where(going, target, found)
        return a, num_edges, state, found, going & (target == 0)

    added = (a, growing.num_edges, growing.last, jnp.zeros_like(new), is_read)
    a, num_edges, state, found, _ = jax.lax.while_loop(lambda c: c[-1].any(), add, added)

    # -- Where that one leads, longer strings end as well: the shorter ones get their own state.
    clone = new + 1
    length = a.length[rows, state] + 1
    is_split = (found > 0) & (a.length[rows, found] != length)
    a = a.replace(
        length=put(a.length, clone, length, is_split),
        link=put(a.link, clone, a.link[rows, found], is_split),
        end=put(a.end, clone, a.end[rows, found], is_split),
    )

    def copy(carry: _Copied) -> _Copied:
        a, num_edges, edge = carry
        going = edge > 0
        known = a.token[rows, edge], a.to[rows, edge]
        following = a.following[rows, edge]
        a = add_edge(a, num_edges + 1, clone, *known, going)
        return a, num_edges + going, following

    copied = (a, num_edges, jnp.where(is_split, a.first[rows, found], 0))
    a, num_edges, _ = jax.lax.while_loop(lambda c: (c[-1] > 0).any(), copy, copied)

    def redirect(carry: _Redirected) -> _Redirected:
        a, state, edge, going = carry
        is_root = state == 0
        a = a.replace(
            root=put(a.root, token, clone, going & is_root),
            to=put(a.to, edge, clone, going & ~is_root),
        )
        going &= ~is_root
        state = jnp.where(going, a.link[rows, state], state)
        target, edge = a.find(rows, state, token)
        return a, state, edge, going & (target == found)

    redirected = (a, state, a.find(rows, state, token)[1], is_split)
    a, *_ = jax.lax.while_loop(lambda c: c[-1].any(), redirect, redirected)
    link = put(a.link, found, clone, is_split)
    link = put(link, new, jnp.where(is_split, clone, found), is_read)
    return Growing(
        automaton=a.replace(link=link),
        num_states=growing.num_states + is_read + is_split,
        num_edges=num_edges,
        last=jnp.where(is_read, new, growing.last),
        num_read=growing.num_read + is_read,
    )


def follow(
    automaton: Automaton, state: jax.Array, matched: jax.Array, token: jax.Array, is_read: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The longest suffix of a text that one automaton (A is 1) knows, with one token more.

    Args:
      automaton: what is searched.
      state: [B] int32. That of the longest suffix so far.
      matched: [B] int32. How long that is.
      token: [B] int32. What comes behind it.
      is_read: [B] bool. Rows of the others stay as they are.

    Returns:
      The same of the text with the token, state and length.
    """
    rows = jnp.zeros_like(state)

    def is_lost(state: jax.Array, target: jax.Array) -> jax.Array:
        return is_read & (target == 0) & (state > 0)

    def shorten(carry: _Shortened) -> _Shortened:
        state, matched, target = carry
        lost = is_lost(state, target)
        state = jnp.where(lost, automaton.link[0, state], state)
        matched = jnp.where(lost, automaton.length[0, state], matched)
        return state, matched, automaton.find(rows, state, token)[0]

    start = (state, matched, automaton.find(rows, state, token)[0])
    state, matched, target = jax.lax.while_loop(lambda c: is_lost(c[0], c[2]).any(), shorten, start)
    matched = jnp.where(is_read, jnp.where(target > 0, matched + 1, 0), matched)
    return jnp.where(is_read, target, state), matched


class _Builder:
    """An automaton on the host, whose edges are dictionaries; the root's link is -1."""

    def __init__(self) -> None:
        self.length, self.link, self.end = [0], [-1], [0]
        self.edges: list[dict[int, int]] = [{}]

    def read(self, last: int, token: int, place: int) -> int:
        """The state of a text up to `place`, where a token stands; `last` is that before it."""
        if token in self.edges[last]:  # the text begins like another one
            return self._split(last, token)
        new = self._state(self.length[last] + 1, 0, place, {})
        state = last
        while state >= 0 and token not in self.edges[state]:
            self.edges[state][token] = new
            state = self.link[state]
        if state >= 0:
            self.link[new] = self._split(state, token)
        return new

    def _state(self, length: int, link: int, end: int, edges: dict[int, int]) -> int:
        self.length.append(length)
        self.link.append(link)
        self.end.append(end)
        self.edges.append(edges)
        return len(self.length) - 1

    def _split(self, state: int, token: int) -> int:
        """Where the token leads from a state: to strings that are no longer than they must be."""
        found, length = self.edges[state][token], self.length[state] + 1
        if self.length[found] == length:
            return found
        same = dict(self.edges[found])
        clone = self._state(length, self.link[found], self.end[found], same)
        self.link[found] = clone
        while state >= 0 and self.edges[state].get(token) == found:
            self.edges[state][token] = clone
            state = self.link[state]
        return clone

    def automaton(self, vocab_size: int) -> Automaton:
        root = np.zeros(vocab_size, np.int32)
        root[list(self.edges[0])] = list(self.edges[0].values())
        sizes = np.array([0, *(len(edges) for edges in self.edges[1:])])
        E = 1 + int(sizes.sum())
        every = [edge for edges in self.edges[1:] for edge in edges.items()]
        token, to = np.zeros((2, E), np.int32)
        token[1:], to[1:] = np.array(every, np.int32).reshape(-1, 2).T
        ends = np.cumsum(sizes)  # of a state's edges, the last one
        following = np.arange(1, E + 1, dtype=np.int32)
        following[ends] = 0  # edge 0 as well
        arrays = {
            "length": self.length, "link": [0, *self.link[1:]], "end": self.end, "root": root,
            "first": np.where(sizes > 0, ends - sizes + 1, 0), "token": token, "to": to,
            "following": following,
        }  # fmt: skip
        return Automaton(**{k: jnp.asarray(x, jnp.int32)[None] for k, x in arrays.items()})


def build_corpus(texts: Sequence[Sequence[int]], vocab_size: int) -> Corpus:
    """The common automaton of texts, made on the host: ten seconds per million tokens.

    Args:
      texts: token ids.
      vocab_size: V, of the model that will write.

    Raises:
      ValueError: there is no token, or something that is none of the model's.
    """
    builder, tokens = _Builder(), list[int]()
    for text in texts:
        last = 0
        for token in token_ids("texts", text, vocab_size):
            last = builder.read(last, token, len(tokens))
            tokens.append(token)
        tokens.append(-1)
    if max(tokens, default=-1) < 0:
        raise ValueError(f"texts has {len(texts)} texts and no token: give at least one")
    return Corpus(jnp.asarray(tokens, jnp.int32), builder.automaton(vocab_size))
