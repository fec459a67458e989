"""Lookahead decoding: Jacobi iterates leave n-grams behind, and those that fit are judged.

Reference: Fu et al., "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding",
arXiv:2402.02057, Sec. 3, and the public code. With the root at position p, one forward holds

    window      N - 1 rows of W guesses; cell (r, j) is at p + r + j, cell (0, 0) is the root. A
                cell sees row 0 up to its own column, and its column from row 1 down to itself.
    candidates  the n-grams of N tokens that were seen to begin with the root, without it.

What the target puts behind the last row's cells, new[j], is the next row, while the oldest row
goes; and (cell(1, j), .., cell(N - 2, j), new[j]) is remembered as what may follow cell (0, j).
When a + 1 tokens are written, the window moves on by a columns; those that are missing on its right
are filled with tokens of the text, as the whole window is at first.

The root is that of the draft tree, under which the candidates hang; the other cells are rows of the
drafter's own (`ExtraRows`): they are read, but no text ever goes through them.

Letters: B rows, V vocabulary, N length of n-grams, W window, G n-grams per first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.streams import Stream, fold_in, uniforms
from decode.speculative.contracts import Context, Drafter, ExtraRows, Proposal, Seen, spent
from decode.speculative.tree import DraftTree
from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params


class LookaheadState(struct.PyTreeNode):
    """Guesses and n-grams.

    Attributes:
      window: [B, N - 1, W] int32. Cell (0, 0) is of no meaning; -1: nothing is known yet.
      pool: [B, V, G, N - 1] int32. By first token, what followed it, the latest last; -1: nothing.
      rounds: [B] int32. Rounds so far: as long as a row is filler, nothing is remembered.
    """

    window: jax.Array
    pool: jax.Array
    rounds: jax.Array


@struct.dataclass
class Lookahead(Drafter):
    """N-grams that the target's own iterates left behind, judged with them; nothing is trained.

    The pool takes V G (N - 1) numbers per row of the batch.

    Attributes:
      ngram: N >= 3 (published for 7B: 5). Static.
      window: W >= 1 (7). Static.
      num_candidates: G >= 1 (7). Static.
    """

    notices_pauses: ClassVar[bool] = True
    ngram: int = struct.field(pytree_node=False, default=5)
    window: int = struct.field(pytree_node=False, default=7)
    num_candidates: int = struct.field(pytree_node=False, default=7)

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"lookahead": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(ngram=4, window=3, num_candidates=2)

    def validate(self, cfg: ModelConfig) -> None:
        if self.ngram < 3 or self.window < 1 or self.num_candidates < 1:
            raise ValueError(
                f"ngram={self.ngram} must be at least 3, window={self.window} and "
                f"num_candidates={self.num_candidates} 1"
            )

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def num_nodes(self) -> int:
        return 1 + (self.ngram - 1) * self.num_candidates

    @property
    def num_extra(self) -> int:
        return (self.ngram - 1) * self.window - 1

    @property
    def depth(self) -> int:
        return self.ngram - 1

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> LookaheadState:
        pool = (batch_size, cfg.vocab_size, self.num_candidates, self.ngram - 1)
        return LookaheadState(
            window=jnp.full((batch_size, self.ngram - 1, self.window), -1, jnp.int32),
            pool=jnp.full(pool, -1, jnp.int32),
            rounds=jnp.zeros(batch_size, jnp.int32),
        )

    def keep(
        self, cfg: ModelConfig, state: LookaheadState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[LookaheadState, jax.Array]:
        """N-grams are remembered; the window was about what followed the old text."""
        window, rounds = jnp.full_like(state.window, -1), jnp.zeros_like(state.rounds)
        return state.replace(window=window, rounds=rounds), num_kept

    def propose(self, cfg: ModelConfig, context: Context, state: LookaheadState) -> Proposal:
        n, W, G = self.ngram - 1, self.window, self.num_candidates
        root = context.root
        B = root.shape[0]
        window = jnp.where(state.window < 0, self._filler(context, n * W), state.window)
        window = window.at[:, 0, 0].set(root)
        # -- Candidates: those that begin alike share the nodes of the first one.
        found = state.pool[jnp.arange(B), root]  # [B, G, n]
        alike = jnp.cumprod(found[:, :, None] == found[:, None], axis=-1)  # [B, G, G, n]
        first = jnp.argmax(alike, axis=2)  # [B, G, n]: whose node it is
        node = 1 + first * n + jnp.arange(n)[None, None]
        parents = jnp.concatenate([jnp.zeros((B, G, 1), node.dtype), node[:, :, :-1]], axis=2)
        is_own = (first == jnp.arange(G)[None, :, None]) & (found >= 0)
        depths = jnp.broadcast_to(jnp.arange(1, n + 1)[None, None], found.shape)

        def below(of_root: jax.Array | int | bool, candidates: jax.Array) -> jax.Array:
            first = jnp.broadcast_to(jnp.asarray(of_root, candidates.dtype), (B,))[:, None]
            return jnp.concatenate([first, candidates.reshape(B, G * n)], axis=1)

        tree = DraftTree(
            tokens=below(root, found),
            parents=below(-1, parents.astype(jnp.int32)),
            depths=below(0, depths.astype(jnp.int32)),
            is_valid=below(True, is_own),
        )
        # -- The window without its first cell, the root.
        sees, offsets = self._window_rows()
        extra = ExtraRows(
            tokens=window.reshape(B, n * W)[:, 1:],
            offsets=jnp.broadcast_to(offsets[None], (B, n * W - 1)),
            sees=jnp.broadcast_to(sees[None], (B, *sees.shape)),
        )
        return Proposal(tree, spent(context, 0), state.replace(window=window), extra)

    def _window_rows(self) -> tuple[jax.Array, jax.Array]:
        """Whom each cell but the root sees [E, nodes + E] bool, and how far behind it is [E]."""
        n, W = self.ngram - 1, self.window
        row, column = np.divmod(np.arange(n * W), W)
        in_first_row = (row[None] == 0) & (column[None] <= column[:, None])
        in_column = (column[None] == column[:, None]) & (row[None] <= row[:, None])
        cells = (in_first_row | in_column)[1:]
        other_nodes = np.zeros((n * W - 1, self.num_nodes - 1), bool)
        sees = np.concatenate([cells[:, :1], other_nodes, cells[:, 1:]], axis=1)
        return jnp.asarray(sees), jnp.asarray((row + column)[1:], jnp.int32)

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: LookaheadState
    ) -> LookaheadState:
        n, W = self.ngram - 1, self.window
        assert seen.extra_hidden is not None
        last = seen.extra_hidden[:, (n - 1) * W - 1 :]  # guesses are never drawn
        new = vocab.read(vocab.head(context.params), last).token
        filler = self._filler(context, n * W)
        ends = jnp.asarray(cfg.eos_ids, jnp.int32)[None, None]
        is_end = (new[..., None] == ends).any(axis=-1)
        new = jnp.where(is_end, filler[:, 0], new)  # nothing follows it

        rows = jnp.concatenate([state.window[:, 1:], new[:, None]], axis=1)
        is_known = (state.rounds >= n - 1) & context.active
        pool = jax.vmap(_remember)(state.pool, state.window[:, 0], rows.swapaxes(1, 2), is_known)

        column = jnp.arange(W)[None, None] + (seen.count - 1)[:, None, None]
        moved = jnp.take_along_axis(rows, jnp.minimum(column, W - 1), axis=2)
        window = jnp.where(column < W, moved, filler)
        return LookaheadState(
            window=jnp.where(context.active[:, None, None], window, state.window),
            pool=pool,
            rounds=state.rounds + context.active,
        )

    def pause(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: LookaheadState
    ) -> LookaheadState:
        """The window moves on by as many columns as tokens were written; nothing is remembered."""
        W = self.window
        column = jnp.arange(W)[None, None] + seen.count[:, None, None]
        moved = jnp.take_along_axis(state.window, jnp.minimum(column, W - 1), axis=2)
        is_known = (column < W) & (moved >= 0)
        filler = self._filler(context, (self.ngram - 1) * W)
        window = jnp.where(is_known, moved, filler)
        active = context.active[:, None, None]
        return state.replace(window=jnp.where(active, window, state.window))

    def _filler(self, context: Context, num: int) -> jax.Array:
        """[B, N - 1, W] int32: tokens of the text."""
        share = uniforms(fold_in(context.key, Stream.FILLER), num)
        place = jnp.floor(share * context.length[:, None]).astype(jnp.int32)
        tokens = jnp.take_along_axis(context.tokens, place, axis=1)
        return tokens.reshape(-1, self.ngram - 1, self.window)


def _remember(
    pool: jax.Array, first: jax.Array, following: jax.Array, is_known: jax.Array
) -> jax.Array:
    """One row's pool with what followed some tokens, which becomes the latest.

    Args:
      pool: [V, G, n] int32.
      first: [W] int32.
      following: [W, n] int32.
      is_known: [] bool. Whether to remember anything.
    """
    G = pool.shape[1]

    def add(pool: jax.Array, entry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        token, ngram = entry
        old = pool[token]
        is_there = (old == ngram[None]).all(axis=1)
        gone = jnp.argmax(is_there)  # the same one, or else the oldest
        later = jnp.minimum(jnp.arange(G) + (jnp.arange(G) >= gone), G - 1)
        new = old[later].at[-1].set(ngram)
        return pool.at[token].set(jnp.where(is_known, new, old)), None

    return jax.lax.scan(add, pool, (first, following))[0]
