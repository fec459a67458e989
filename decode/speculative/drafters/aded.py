"""ADED (Adaptix): what followed the last two tokens before, explored by a tree search.

Reference: Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
arXiv:2407.12021, and the public code. A table of trigrams says how much c counts after (a, b); in
every round each trigram among the last tokens counts more, those that stay there again and again.
A search from the last two tokens, whose nodes have visits N, scores Q and priors p (their values),
repeats

    select    the child with the largest Q / N + (c1 + ln((N' + c2 + 1) / c2)) p sqrt(N') / (1 + N),
              N' of the parent; the first one without visits, as long as there is one
    expand    where no child was made yet: all successors become children, the last one is gone to
    roll out  successors in proportion to their values, down to three levels below the root
    back up   N += 1 and Q += 1 + the values on the way, of the node expanded and all above it

and the most visited nodes, each with its best successor, are the tree.

As the card of the method recommends, successors are ordered by value and token, so that runs can be
repeated, and the values on the way are those of the tokens gone to, where the public code takes
those of the tokens before them. Its cut at 64 nodes then takes nothing away.

Letters: B rows, W nodes, H places of pairs, K successors, I nodes that have children, M nodes of
the search: node 0 is the root, and K i + 1 .. K i + K are what node i may have as children.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.requests import made_by
from decode.core.streams import uniforms
from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.drafters.trigrams import WAYS, Trigrams, add, empty, look_up
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig
from dlm.params import Params

LEVELS = 3  # of the search below its root

# Visits [B, M], scores [B, M], whether children were made [B, I].
_Search = tuple[jax.Array, jax.Array, jax.Array]


@struct.dataclass
class ADED(Drafter):
    """A tree of trigrams that grow with what is written; nothing is trained.

    The table takes H (2 K + 2) numbers per row of the batch, and is kept from text to text.

    Attributes:
      corpus: of `trigrams.count_trigrams`, with as many successors; None: nothing is known at
        first.
      c1: >= 0. How much is explored.
      c2: > 0. The higher, the longer as much.
      increment: >= 0. What a trigram counts more in every round.
      cap: >= 0. The most that it counts.
      num_pairs: H >= 8, a multiple of it. Static.
      num_successors: K >= 1. Static.
      window: >= 3. How many of the last tokens are learned from in a round. Static.
      num_visits: >= 1, of the search. Static.
      num_kept: >= 2, nodes of the search that are kept, its root included. Static.
    """

    corpus: Trigrams | None = None
    c1: jax.Array | float = 32.0
    c2: jax.Array | float = 8.0
    increment: jax.Array | float = 0.04
    cap: jax.Array | float = 3.0
    num_pairs: int = struct.field(pytree_node=False, default=4096)
    num_successors: int = struct.field(pytree_node=False, default=12)
    window: int = struct.field(pytree_node=False, default=16)
    num_visits: int = struct.field(pytree_node=False, default=150)
    num_kept: int = struct.field(pytree_node=False, default=24)

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"aded": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(num_pairs=256, num_successors=4, num_visits=20, num_kept=6)

    def validate(self, cfg: ModelConfig) -> None:
        least = {"num_successors": 1, "window": 3, "num_visits": 1, "num_kept": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.num_pairs < WAYS or self.num_pairs % WAYS:
            raise ValueError(f"num_pairs={self.num_pairs} must be a multiple of {WAYS}")
        if self.num_kept > self._num_nodes:
            raise ValueError(
                f"num_kept={self.num_kept} must be at most {self._num_nodes}, the nodes of a "
                f"search with num_successors={self.num_successors}"
            )
        for name in ("c1", "increment", "cap"):
            if not 0 <= float(getattr(self, name)) < math.inf:
                raise ValueError(
                    f"{name}={float(getattr(self, name)):g} must be at least 0 and finite"
                )
        if not 0 < float(self.c2) < math.inf:
            raise ValueError(f"c2={float(self.c2):g} must be > 0 and finite")
        if self.corpus is None:
            return
        made_by("corpus", self.corpus, Trigrams, "count_trigrams")
        if self.corpus.tokens.shape[2] != self.num_successors:
            raise ValueError(
                f"num_successors={self.num_successors} must be {self.corpus.tokens.shape[2]}, "
                "those of the corpus"
            )

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def num_nodes(self) -> int:
        return 2 * self.num_kept - 1

    @property
    def depth(self) -> int:
        return LEVELS + 1

    @property
    def _num_inner(self) -> int:
        """I."""
        return sum(self.num_successors**level for level in range(LEVELS))

    @property
    def _num_nodes(self) -> int:
        """M."""
        return 1 + self.num_successors * self._num_inner

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Trigrams:
        return empty(batch_size, self.num_pairs, self.num_successors)

    def propose(self, cfg: ModelConfig, context: Context, state: Trigrams) -> Proposal:
        state = self._learn(context, state)
        last = self._last(context, 2)
        tokens, values = self._known(state, last)
        visits, _, is_open = self._search(context, values)
        tree = self._tree(state, last, tokens, values, visits, is_open)
        return Proposal(tree, spent(context, 0), state)

    def _last(self, context: Context, num: int) -> jax.Array:
        """[B, num] int32: the last tokens; -1 before the first one."""
        place = context.length[:, None] - num + jnp.arange(num)[None]
        tokens = jnp.take_along_axis(context.tokens, jnp.maximum(place, 0), axis=1)
        return jnp.where(place >= 0, tokens, -1)

    def _learn(self, context: Context, state: Trigrams) -> Trigrams:
        """Every trigram among the last tokens counts more."""
        last = self._last(context, self.window)

        def learn(i: jax.Array, state: Trigrams) -> Trigrams:
            trigram = jax.lax.dynamic_slice_in_dim(last, i, 3, axis=1)
            is_new = context.active & (trigram[:, 0] >= 0)
            return add(state, self.corpus, trigram, is_new, self.increment, self.cap)

        learned: Trigrams = jax.lax.fori_loop(0, self.window - 2, learn, state)
        return learned

    def _known(self, state: Trigrams, last: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens and values [B, I, K] of the children that inner nodes may have."""
        B, K = len(last), self.num_successors
        before, here = last[:, :1], last[:, 1:]  # of the pairs of one level
        every = []
        for _ in range(LEVELS):
            found = look_up(state, self.corpus, jnp.stack([before, here], axis=2))
            every.append(found)
            before, here = jnp.repeat(here, K, axis=1), found[0].reshape(B, -1)
        tokens, values = (jnp.concatenate(x, axis=1) for x in zip(*every, strict=True))
        return tokens, values

    def _search(self, context: Context, values: jax.Array) -> _Search:
        """Visits of a search over children of values [B, I, K]; 0: there is none."""
        B, K = values.shape[0], self.num_successors
        rows, place = jnp.arange(B), jnp.arange(K)[None]
        chance = uniforms(context.key, self.num_visits * LEVELS)
        count = (values > 0).sum(axis=2)  # [B, I]
        weights = jnp.cumsum(values, axis=2)

        def choose(node: jax.Array, search: _Search) -> jax.Array:
            """[B]: the child to go to of nodes [B]."""
            visits, scores, _ = search
            children = K * node[:, None] + 1 + place
            N, Q = visits[rows[:, None], children], scores[rows[:, None], children]
            above = visits[rows, node][:, None]
            explore = self.c1 + jnp.log((above + self.c2 + 1) / self.c2)
            explore *= values[rows, node] * jnp.sqrt(above) / (1 + N)
            merit = jnp.where(N > 0, Q / jnp.maximum(N, 1) + explore, jnp.inf)
            return jnp.argmax(jnp.where(place < count[rows, node][:, None], merit, -1), axis=1)

        def visit(i: jax.Array, search: _Search) -> _Search:
            visits, scores, is_open = search
            node = jnp.zeros(B, jnp.int32)
            selects, rolls = jnp.ones(B, bool), jnp.zeros(B, bool)
            score, way = jnp.ones(B), [node]
            for level in range(LEVELS):
                num, was_open = count[rows, node], is_open[rows, node]
                goes, expands = (selects | rolls) & (num > 0), selects & ~was_open & (num > 0)
                wanted = chance[:, i * LEVELS + level] * weights[rows, node, -1]
                drawn = (weights[rows, node] <= wanted[:, None]).sum(axis=1)
                k = jnp.where(was_open, choose(node, (visits, scores, is_open)), num - 1)
                k = jnp.where(rolls, jnp.minimum(drawn, num - 1), k)
                is_open = is_open.at[rows, node].set(was_open | expands)
                score += jnp.where(goes, values[rows, node, k], 0)
                is_counted = selects & goes
                node = jnp.where(goes, K * node + 1 + k, node).astype(jnp.int32)
                way.append(jnp.where(is_counted, node, visits.shape[1]))
                selects, rolls = selects & was_open & goes, goes & (expands | rolls)
            for counted in way:
                visits = visits.at[rows, counted].add(1, mode="drop")
                scores = scores.at[rows, counted].add(score, mode="drop")
            return visits, scores, is_open

        zeros = jnp.zeros((B, self._num_nodes))
        start = zeros, zeros, jnp.zeros((B, self._num_inner), bool)
        searched: _Search = jax.lax.fori_loop(0, self.num_visits, visit, start)
        return searched

    def _tree(
        self, state: Trigrams, last: jax.Array, tokens: jax.Array, values: jax.Array,
        visits: jax.Array, is_open: jax.Array,
    ) -> DraftTree:  # fmt: skip
        """The most visited nodes, and behind them the best successor of each but the root."""
        B, K, num = len(last), self.num_successors, self.num_kept
        is_made = (is_open[..., None] & (values > 0)).reshape(B, -1)
        is_made = jnp.pad(is_made, ((0, 0), (1, 0)), constant_values=True)
        # Of equals the lower one: a parent comes before its children.
        most, kept = jax.lax.top_k(jnp.where(is_made, visits, -1), num)
        kept = kept.astype(jnp.int32)
        of_node = jnp.concatenate([last[:, 1:], tokens.reshape(B, -1)], axis=1)
        at = lambda x, index: jnp.take_along_axis(x, index, axis=1)  # noqa: E731
        above = jnp.maximum(kept - 1, 0) // K
        parent = jnp.argmax(above[:, :, None] == kept[:, None], axis=2).astype(jnp.int32)
        depth = sum((kept >= sum(K**level for level in range(n))).astype(jnp.int32)
                    for n in range(1, LEVELS + 1))  # fmt: skip
        token = at(of_node, kept)
        before = jnp.where(kept > 0, at(of_node, above), last[:, :1])
        best = look_up(state, self.corpus, jnp.stack([before, token], axis=2))[0][..., 0]
        is_kept = most >= 0
        is_there = ((K * kept + 1)[:, :, None] == kept[:, None]) & is_kept[:, None]
        is_more = is_kept & (best >= 0) & ~is_there.any(axis=2)
        node = jnp.broadcast_to(jnp.arange(1, num, dtype=jnp.int32)[None], (B, num - 1))
        both = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
        return DraftTree(
            tokens=both(token, best[:, 1:]),
            parents=both(parent.at[:, 0].set(-1), node),
            depths=both(depth, depth[:, 1:] + 1),
            is_valid=both(is_kept, is_more[:, 1:]),
        )
