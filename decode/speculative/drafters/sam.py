"""SAM decoding: what followed the longest suffix of the text that has come up before, in the text
itself or in a corpus.

Reference: Hu et al., "SAM Decoding: Speculative Decoding via Suffix Automaton", arXiv:2411.10666.
Two suffix automata find that suffix, however long it is: one of the text, extended by every token
that is written, and one of a corpus, made once (`automaton`). What stood behind its first
occurrence is the draft. The corpus is asked where it knows a longer suffix, by `corpus_margin`
tokens.

The publication turns to another drafter where both suffixes are short, by which `Hybrid` is meant.

Letters: B rows, S token slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.requests import made_by
from decode.speculative.contracts import Context, Drafter, Proposal, Seen, spent
from decode.speculative.drafters.automaton import (
    Corpus,
    Growing,
    build_corpus,
    empty,
    extend,
    follow,
)
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig
from dlm.params import Params

LONGEST = 8  # of matches that are told apart


class SAMState(struct.PyTreeNode):
    """What was read.

    Attributes:
      text: the automaton of each text; its `num_read` tokens are what all else is about.
      place: [B] int32. The corpus's state of the longest suffix that it knows; 0 without one.
      matched: [B] int32. Tokens of that suffix.
    """

    text: Growing
    place: jax.Array
    matched: jax.Array


@struct.dataclass
class SAM(Drafter):
    """A chain that is copied from behind the longest match in text or corpus; nothing is trained.

    An automaton takes about 17 S + V numbers per row of the batch.

    Attributes:
      corpus: of `automaton.build_corpus`; None: the text alone is searched.
      num_drafts: >= 1, most tokens per round. Static.
      min_match: >= 1, the shortest suffix that drafts, in tokens.
      corpus_margin: >= 0. By how many tokens a suffix must be longer to be taken from the corpus.
    """

    corpus: Corpus | None = None
    num_drafts: int = struct.field(pytree_node=False, default=16)
    min_match: jax.Array | int = 1
    corpus_margin: jax.Array | int = 5

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"sam": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        text = np.random.default_rng(0).integers(0, min(cfg.vocab_size, 8), 100).tolist()
        return cls(build_corpus([text], cfg.vocab_size), num_drafts=4, corpus_margin=0)

    def validate(self, cfg: ModelConfig) -> None:
        if self.num_drafts < 1:
            raise ValueError(f"num_drafts={self.num_drafts} must be at least 1")
        if int(self.min_match) < 1:
            raise ValueError(f"min_match={int(self.min_match)} must be at least 1")
        if int(self.corpus_margin) < 0:
            raise ValueError(f"corpus_margin={int(self.corpus_margin)} must be at least 0")
        if self.corpus is not None:
            made_by("corpus", self.corpus, Corpus, "build_corpus")
            known = self.corpus.automaton.root.shape[1]
            if known != cfg.vocab_size:
                raise ValueError(
                    f"the corpus is of a vocabulary of {known} tokens and the target has "
                    f"{cfg.vocab_size}: build it with vocab_size={cfg.vocab_size}"
                )

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)

    @property
    def num_grades(self) -> int:
        """By how many tokens agree."""
        return LONGEST

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> SAMState:
        zeros = jnp.zeros(batch_size, jnp.int32)
        return SAMState(empty(batch_size, num_slots, cfg.vocab_size), zeros, zeros)

    def prefill(self, cfg: ModelConfig, context: Context, seen: Seen, state: SAMState) -> SAMState:
        return self._read(context, jnp.where(seen.count > 0, seen.start + seen.count, 0), state)

    def keep(
        self, cfg: ModelConfig, state: SAMState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[SAMState, jax.Array]:
        """An automaton does not get smaller: it is made anew, by the first call of `prefill`."""
        return jax.tree.map(jnp.zeros_like, state), num_kept

    def propose(self, cfg: ModelConfig, context: Context, state: SAMState) -> Proposal:
        state = self._read(context, context.length, state)
        rows, text = jnp.arange(len(context.length)), state.text
        shorter = text.automaton.link[rows, text.last]  # ends elsewhere, too
        matched = text.automaton.length[rows, shorter]
        drafts = self._behind(context.tokens, text.automaton.end[rows, shorter])
        is_text = self._place(text.automaton.end[rows, shorter]) < context.length[:, None]
        if self.corpus is not None:
            is_better = state.matched > matched + self.corpus_margin
            every = jnp.broadcast_to(self.corpus.tokens[None], (len(rows), len(self.corpus.tokens)))
            place = self.corpus.automaton.end[0, state.place]
            others = self._behind(every, place)
            drafts = jnp.where(is_better[:, None], others, drafts)
            is_text = jnp.where(is_better[:, None], jnp.cumprod(others >= 0, axis=1) > 0, is_text)
            matched = jnp.where(is_better, state.matched, matched)
        is_valid = is_text & (matched >= self.min_match)[:, None]
        tree = self.shape.tree(
            jnp.concatenate([context.root[:, None], drafts], axis=1),
            jnp.pad(is_valid, ((0, 0), (1, 0)), constant_values=True),
        )
        return Proposal(
            tree, spent(context, 0), state, grade=jnp.clip(matched - 1, 0, self.num_grades - 1)
        )

    def _place(self, end: jax.Array) -> jax.Array:
        """[B, J] int32: the slots behind [B]."""
        return end[:, None] + jnp.arange(1, self.num_drafts + 1)[None]

    def _behind(self, source: jax.Array, end: jax.Array) -> jax.Array:
        """[B, J] int32: what stands there in [B, M]."""
        return jnp.take_along_axis(source, self._place(end), axis=1, mode="clip")

    def _read(self, context: Context, end: jax.Array, state: SAMState) -> SAMState:
        """All tokens before position `end` [B] are read, of active rows."""

        def is_behind(state: SAMState) -> jax.Array:
            return (state.text.num_read < end) & context.active

        def read(state: SAMState) -> SAMState:
            is_read, place = is_behind(state), state.text.num_read[:, None]
            token = jnp.take_along_axis(context.tokens, place, axis=1, mode="clip")[:, 0]
            text, corpus = extend(state.text, token, is_read), (state.place, state.matched)
            if self.corpus is not None:
                corpus = follow(self.corpus.automaton, *corpus, token, is_read)
            return SAMState(text, *corpus)

        read_all: SAMState = jax.lax.while_loop(lambda s: is_behind(s).any(), read, state)
        return read_all
