"""What came after the last few tokens before comes after them again: no model drafts.

Reference: Saxena, "Prompt Lookup Decoding" (2023); also in Hugging Face's `generate` as
`prompt_lookup_num_tokens`. The longest suffix of the text, of at most `max_ngram` tokens, that
occurs in it before is looked for, and what followed it is the draft.

Letters: B rows, S slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct

from decode.core.matches import match_lengths
from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig


@struct.dataclass
class PromptLookup(Drafter):
    """A chain that is copied from prompt and completion; nothing is trained.

    Attributes:
      num_drafts: >= 1, most tokens per round. Static.
      max_ngram: >= 1, longest suffix that is looked for, in tokens. Static.
      min_ngram: >= 1, shortest. Static.
      latest: whether the last occurrence is taken, not the first (as published). Static.
    """

    reads_text: ClassVar[bool] = True

    num_drafts: int = struct.field(pytree_node=False, default=10)
    max_ngram: int = struct.field(pytree_node=False, default=3)
    min_ngram: int = struct.field(pytree_node=False, default=1)
    latest: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"prompt_lookup": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if self.num_drafts < 1:
            raise ValueError(f"num_drafts={self.num_drafts} must be at least 1")
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"min_ngram={self.min_ngram} must be at least 1 and at most "
                f"max_ngram={self.max_ngram}"
            )

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)

    @property
    def num_grades(self) -> int:
        """By how many tokens agree, up to twice as many as are looked for."""
        return 2 * self.max_ngram

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        tokens, length = context.tokens, context.length[:, None]
        S = tokens.shape[1]
        slot = jnp.arange(S)[None]
        agree = match_lengths(tokens, tokens, context.length, self.num_grades)
        # An occurrence must end before the text does; the longest match wins, then first or last.
        matched = jnp.minimum(agree, self.max_ngram)
        matched = jnp.where((slot < length - 1) & (matched >= self.min_ngram), matched, 0)
        place = slot if self.latest else S - slot
        where = jnp.argmax(matched * (S + 1) + jnp.where(matched > 0, place, 0), axis=1)
        found = jnp.take_along_axis(matched, where[:, None], axis=1) > 0
        source = where[:, None] + jnp.arange(1, self.num_drafts + 1)[None]
        drafts = jnp.take_along_axis(tokens, jnp.minimum(source, S - 1), axis=1)
        is_valid = found & (source < length)
        tree = chain(self.num_drafts).tree(
            jnp.concatenate([context.root[:, None], drafts], axis=1),
            jnp.concatenate([jnp.ones_like(found), is_valid], axis=1),
        )
        grade = jnp.take_along_axis(agree, where[:, None], axis=1)[:, 0] - 1
        return Proposal(tree, spent(context, 0), state, grade=jnp.maximum(grade, 0))
