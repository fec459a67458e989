"""Input-guided aggressive decoding: the text to be edited is the draft of what is written.

Reference: Sun et al., "Instantaneous Grammatical Error Correction with Shallow Aggressive
Decoding", arXiv:2106.04970, and Ge et al., "Lossless Acceleration for Seq2seq Generation with
Aggressive Decoding", arXiv:2205.10350, Sec. 3.1, and the public code (IAD). With a source of m
tokens s that stands in the prompt, drafts are s[p:], where p is 0 at first, and then

    for n = 1, 2, 3: the last n tokens that were written come up nowhere in s   no draft
                     they come up once                                          p is behind them

and with more than one place for n = 3 there is no draft either. An end-of-text is never drafted.

Drafts of the publication reach to the end of the source; here a round judges `num_drafts` at most,
and one that accepted all of them, and wrote the next token of the source behind, is gone on with.

Letters: B rows, S slots, J drafts, N longest n-gram.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.matches import match_lengths
from decode.core.requests import token_ids
from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.tokenizer import Tokenizer


class CopyState(struct.PyTreeNode):
    """What was drafted last.

    Attributes:
      place: [B] int32. The slot of its first token; -1: there was none.
      length: [B] int32. Tokens of the text before it.
    """

    place: jax.Array
    length: jax.Array


@struct.dataclass
class InputGuided(Drafter):
    """A chain that is copied from the part of the prompt that is to be edited.

    That part stands between two marks of the prompt's template, such as "Input:" and "Output:"; of
    several the last ones count. A prompt without them has no source, and nothing is drafted.

    Attributes:
      opening: [a] int32. Tokens behind which the source begins; none: where the prompt does.
      closing: [c] int32. Tokens before which it ends; none: where the prompt does.
      num_drafts: J >= 1, most tokens per round. Static.
      max_ngram: N >= 1, the longest n-gram that is looked for. Static.
    """

    opening: jax.Array | tuple[int, ...] = ()
    closing: jax.Array | tuple[int, ...] = ()
    num_drafts: int = struct.field(pytree_node=False, default=24)
    max_ngram: int = struct.field(pytree_node=False, default=3)

    @classmethod
    def between(cls, tokenizer: Tokenizer, opening: str, closing: str) -> Self:
        """Of sources between two marks, such as those of `dlm.tasks.rewriting`."""
        return cls(tuple(tokenizer.encode(opening)), tuple(tokenizer.encode(closing)))

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"input_guided": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(num_drafts=4)

    def validate(self, cfg: ModelConfig) -> None:
        if min(self.num_drafts, self.max_ngram) < 1:
            raise ValueError(
                f"num_drafts={self.num_drafts} and max_ngram={self.max_ngram} must be at least 1"
            )
        for name in ("opening", "closing"):
            token_ids(name, getattr(self, name), cfg.vocab_size)

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)

    @property
    def num_grades(self) -> int:
        """By the n-gram that was found; the highest is for copies that begin or go on."""
        return self.max_ngram + 1

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> CopyState:
        return CopyState(jnp.full(batch_size, -1, jnp.int32), jnp.zeros(batch_size, jnp.int32))

    def keep(
        self, cfg: ModelConfig, state: CopyState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[CopyState, jax.Array]:
        """Another text is another copy."""
        return state.replace(place=jnp.full_like(state.place, -1)), num_kept

    def propose(self, cfg: ModelConfig, context: Context, state: CopyState) -> Proposal:
        tokens, length = context.tokens, context.length
        assert context.prompt_len is not None
        S, begin, end = tokens.shape[1], *self._source(context)
        slot, written = jnp.arange(S)[None], length - context.prompt_len
        at = lambda place: jnp.take_along_axis(tokens, place, axis=1, mode="clip")  # noqa: E731

        # -- Where the last tokens come up, once.
        agree = match_lengths(tokens, tokens, length, self.max_ngram)
        agree = jnp.minimum(jnp.minimum(agree, written[:, None]), slot - begin[:, None] + 1)
        agree = jnp.where((slot >= begin[:, None]) & (slot < end[:, None]), agree, 0)
        n = jnp.arange(1, self.max_ngram + 1)
        places = (agree[:, None] >= n[None, :, None]).sum(axis=2)  # [B, N]
        least = jnp.argmax(places <= 1, axis=1)[:, None]
        is_found = jnp.take_along_axis(places, least, axis=1)[:, 0] == 1
        found = jnp.argmax(agree > least, axis=1) + 1

        # -- Whether everything since the last draft is a copy of what stands there.
        shift = (state.place - state.length)[:, None]
        is_copy = (at(slot + shift) == tokens) | (slot < state.length[:, None])
        following = state.place + length - state.length
        goes_on = (is_copy | (slot >= length[:, None])).all(axis=1)
        goes_on &= (state.place >= 0) & (following <= end)

        place = jnp.where(is_found, found, -1)
        place = jnp.where(goes_on, following, place)
        place = jnp.where(written == 0, begin, place).astype(jnp.int32)
        grade = jnp.where(is_found, least[:, 0], 0)
        grade = jnp.where(goes_on | (written == 0), self.max_ngram, grade).astype(jnp.int32)
        source = place[:, None] + jnp.arange(self.num_drafts)[None]
        is_end = jnp.isin(at(source), jnp.array(cfg.eos_ids, jnp.int32))
        is_valid = (place >= 0)[:, None] & (source < end[:, None])
        is_valid &= jnp.cumsum(is_end, axis=1) == 0
        tree = self.shape.tree(
            jnp.concatenate([context.root[:, None], at(source)], axis=1),
            jnp.pad(is_valid, ((0, 0), (1, 0)), constant_values=True),
        )
        return Proposal(tree, spent(context, 0), CopyState(place, length), grade=grade)

    def _source(self, context: Context) -> tuple[jax.Array, jax.Array]:
        """Slots [B] of its first token, and behind its last one."""
        assert context.prompt_len is not None
        first, last = jnp.zeros_like(context.prompt_len), context.prompt_len
        closing, opening = (jnp.asarray(x, jnp.int32) for x in (self.closing, self.opening))
        if len(closing):
            place = _last(context.tokens, closing, last)
            last = jnp.maximum(place, 0)
        if len(opening):
            place = _last(context.tokens, opening, last)
            first = jnp.where(place < 0, last, place + len(opening))
        return first, last


def _last(tokens: jax.Array, wanted: jax.Array, end: jax.Array) -> jax.Array:
    """Where some tokens [n] last come up in [B, S], before slot end [B]; -1: nowhere. [B]."""
    slot, num = jnp.arange(tokens.shape[1])[None], len(wanted)
    is_there = slot + num <= end[:, None]
    for i in range(num):
        is_there &= jnp.roll(tokens, -i, axis=1) == wanted[i]
    return jnp.where(is_there, slot, -1).max(axis=1)
