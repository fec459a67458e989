"""Speculative Jacobi decoding: Jacobi iterates that are drawn, and tested against their own laws.

Reference: Teng et al., "Accelerating Auto-regressive Text-to-Image Generation with Training-free
Speculative Jacobi Decoding", arXiv:2410.01699, and the public code. `Jacobi` judges what the target
itself said of a window in the round before. Here that is drawn, y_i ~ p_i, and p_i is kept beside
it: it is the law q_i that the guess is tested against in the next round, with p_i as it is then,

    accepted with probability min(1, p_i(x_i) / q_i(x_i)), or else replaced by a draw from
    norm(max(p_i - q_i, 0)), behind which every guess is drawn anew from this round's p_i,

which is `SpeculativeSampling` of a drawn chain. Each guess was drawn by coins of its own from a law
that was known before it, so the text follows the target's law, whatever the guesses before it were;
a guess whose law is not that of the round in which it was drawn would break this. With temperature
None this is `Jacobi`. `Match` is exact, too, but accepts less.

Positions that nothing was said of yet begin with a token of some initialisation, whose law is 1 at
it. Text is a row without end; of images that are written row by row, the left or the upper
neighbour is often right.

Deviations: a guess that a controller has not judged keeps its token and law; what lies behind the
window is initialised when it comes into it. Classifier-free guidance, with which image models are
published, is not here: laws are those of one forward.

Letters: B rows, J guesses, M nodes that were judged, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import draw
from decode.core.streams import Stream, fold_in, uniforms
from decode.speculative.contracts import Context, Drafter, Proposal, Seen, spent
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig

INITIALISATIONS = ("random", "repeat_horizon", "sample_horizon", "repeat_vertical")


class SpeculativeJacobiState(struct.PyTreeNode):
    """Guesses about what follows the root, and where they are from.

    Attributes:
      tokens: [B, J] int32. -1 where nothing was said yet, behind all others.
      laws: [B, J, V] float32. What they were drawn from.
    """

    tokens: jax.Array
    laws: jax.Array


@struct.dataclass
class SpeculativeJacobi(Drafter):
    """A chain of the draws of the round before, with their laws; nothing is trained.

    Attributes:
      num_guesses: J >= 1; the published window of 16 has the root in it. Static.
      init_by: what stands where nothing was said yet: "random" tokens, "repeat_horizon" (the token
        on the left), "sample_horizon" (the most probable token of the law that the token on the
        left was drawn from) or "repeat_vertical" (the token above). Random where there is no such
        neighbour in the grid. Static.
      row_len: >= 0, tokens of a row of the grid, with its end; 0: all is one row.
      grid_start: >= 0, tokens of the completion before the grid.
      row_end: in [-1, vocab_size), the token that ends each row; -1: there is none.
      first_id: in [0, vocab_size), the first of the random tokens.
      num_ids: >= 0, how many there are, from there on; 0: all.
    """

    num_guesses: int = struct.field(pytree_node=False, default=15)
    init_by: str = struct.field(pytree_node=False, default="repeat_horizon")
    row_len: jax.Array | int = 0
    grid_start: jax.Array | int = 0
    row_end: jax.Array | int = -1
    first_id: jax.Array | int = 0
    num_ids: jax.Array | int = 0

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"speculative_jacobi": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        V = cfg.vocab_size
        if self.num_guesses < 1:
            raise ValueError(f"num_guesses={self.num_guesses} must be at least 1")
        if self.init_by not in INITIALISATIONS:
            raise ValueError(f"init_by={self.init_by} must be one of {INITIALISATIONS}")
        for name, low, high in (("row_end", -1, V), ("first_id", 0, V)):
            if not low <= int(getattr(self, name)) < high:
                raise ValueError(f"{name}={int(getattr(self, name))} must be in [{low}, {high})")
        for name in ("row_len", "grid_start", "num_ids"):
            if int(getattr(self, name)) < 0:
                raise ValueError(f"{name}={int(getattr(self, name))} must be at least 0")
        if int(self.first_id) + int(self.num_ids) > V:
            raise ValueError(
                f"num_ids={int(self.num_ids)} must be at most {V - int(self.first_id)}, the tokens "
                f"from first_id={int(self.first_id)} on"
            )
        if self.init_by == "repeat_vertical" and int(self.row_len) == 0:
            raise ValueError(
                f"row_len={int(self.row_len)} must be at least 1 with init_by=repeat_vertical: one "
                "row has nothing above it"
            )

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_guesses)

    @property
    def draws(self) -> bool:
        return True

    @property
    def needs_probs(self) -> bool:
        return True

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> SpeculativeJacobiState:
        tokens = jnp.full((batch_size, self.num_guesses), -1, jnp.int32)
        return SpeculativeJacobiState(tokens, jnp.zeros((*tokens.shape, cfg.vocab_size)))

    def keep(
        self,
        cfg: ModelConfig,
        state: SpeculativeJacobiState,
        length: jax.Array,
        num_kept: jax.Array,
    ) -> tuple[SpeculativeJacobiState, jax.Array]:
        """What was guessed to follow the old text says nothing of the new one."""
        return state.replace(tokens=jnp.full_like(state.tokens, -1)), num_kept

    def propose(
        self, cfg: ModelConfig, context: Context, state: SpeculativeJacobiState
    ) -> Proposal:
        is_new = state.tokens < 0
        tokens = jnp.where(is_new, self._first_guesses(cfg, context, state), state.tokens)
        certain = jax.nn.one_hot(tokens, cfg.vocab_size, dtype=state.laws.dtype)
        laws = jnp.where(is_new[..., None], certain, state.laws)
        tree = self.shape.tree(
            jnp.concatenate([context.root[:, None], tokens], axis=1),
            probs=jnp.pad(laws, ((0, 0), (0, 1), (0, 0))),  # the last node has no child
        )
        return Proposal(tree, spent(context, 0), SpeculativeJacobiState(tokens, laws))

    def _first_guesses(
        self, cfg: ModelConfig, context: Context, state: SpeculativeJacobiState
    ) -> jax.Array:
        """[B, J] int32: what the initialisation says of every position."""
        assert context.prompt_len is not None
        J, index = self.num_guesses, jnp.arange(self.num_guesses)[None]
        num_ids = jnp.where(self.num_ids == 0, cfg.vocab_size - self.first_id, self.num_ids)
        coins = uniforms(fold_in(context.key, Stream.FILLER), J)
        tokens = self.first_id + (coins * num_ids).astype(jnp.int32)
        place = context.length[:, None] - context.prompt_len[:, None] - self.grid_start + index
        row_len = jnp.maximum(self.row_len, 1)
        is_grid = (place >= 0) & (jnp.asarray(self.row_len) > 0)
        column = place % row_len
        if self.init_by == "repeat_vertical":
            rows_up = index // row_len + 1  # to what is written
            above = context.length[:, None] + index - rows_up * row_len
            above = jnp.take_along_axis(context.tokens, jnp.maximum(above, 0), axis=1, mode="clip")
            tokens = jnp.where(is_grid & (place >= rows_up * row_len), above, tokens)
        elif self.init_by != "random":
            num_said = (state.tokens >= 0).sum(axis=1, keepdims=True)
            newest = jnp.maximum(num_said - 1, 0)
            left = jnp.take_along_axis(state.tokens, newest, axis=1)
            if self.init_by == "sample_horizon":
                law = jnp.take_along_axis(state.laws, newest[..., None], axis=1)
                left = jnp.argmax(law, axis=2).astype(jnp.int32)
            left = jnp.where(num_said > 0, left, context.root[:, None])
            begin = index - column  # of the row, among guesses
            is_first = is_grid & (begin >= num_said)  # whose first token is a random one
            of_row = jnp.take_along_axis(tokens, jnp.clip(begin, 0, J - 1), axis=1)
            tokens = jnp.where(is_first, of_row, left)
        is_end = is_grid & (column == row_len - 1) & (jnp.asarray(self.row_end) >= 0)
        return jnp.where(is_end, self.row_end, tokens)

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: SpeculativeJacobiState
    ) -> SpeculativeJacobiState:
        """What the target now says behind what was kept, drawn with coins that nobody has seen."""
        assert seen.probs is not None and seen.chosen is not None
        said, M = seen.chosen, seen.probs.shape[1]
        if context.sampling.temperature is not None:
            said = draw(fold_in(context.key, Stream.NEXT), seen.probs)
        tokens = jnp.concatenate([said, state.tokens[:, M:]], axis=1)
        laws = jnp.concatenate([seen.probs, state.laws[:, M:]], axis=1)
        index = seen.count[:, None] + jnp.arange(self.num_guesses)[None]
        of = lambda x, at: jnp.take_along_axis(x, at, axis=1, mode="clip")  # noqa: E731
        tokens = jnp.where(index < tokens.shape[1], of(tokens, index), -1)
        return SpeculativeJacobiState(tokens, of(laws, index[..., None]))
