"""Suffix decoding: what most often followed the end of the text, as far as that is likely.

Reference: Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI
Applications", arXiv:2411.04975, Sec. 3, and the public code. For every length of a suffix of the
text, of the places where it comes up, its end among them, the most frequent next token is followed,
again and again; with c of d places left after a step, the probability of the draft is multiplied by
c / d, and it ends where that falls below a threshold or at a length that grows with the suffix. Of
all suffixes the one whose probabilities sum up to most makes the draft, a chain; of equals the
longest.

The publication keeps suffix trees, of the request and of finished texts. Here the text itself is
searched, and a corpus beside it if one is given, the latest `num_places` occurrences of the longest
suffixes; as long as there are no more, counts are the same.

Letters: B rows, S slots, M slots that are searched, O places, Q suffixes, J drafts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.matches import match_lengths
from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig
from dlm.params import Params

# How far suffixes were followed: [] int32; places left [B, Q, O] bool, the draft's probability
# [B, Q]; tokens [J, B, Q] and probabilities [J, B, Q].
_Followed = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@struct.dataclass
class Suffix(Drafter):
    """A chain that is copied from what was written before, by majority; nothing is trained.

    Attributes:
      corpus: [M] int32. Further texts, separated by an id that no text has, such as -1; or None.
      num_drafts: J >= 1, most tokens per round. Static.
      max_suffix: Q >= 1, the longest suffix that is looked for, in tokens. Static.
      factor: >= 0; a suffix of n tokens drafts at most factor * n + offset. Static.
      offset: any number, see `factor`. Static.
      min_probability: in [0, 1], of a draft. Static.
      num_places: O >= 1. Static.
    """

    reads_text: ClassVar[bool] = True

    corpus: jax.Array | None = None
    num_drafts: int = struct.field(pytree_node=False, default=16)
    max_suffix: int = struct.field(pytree_node=False, default=24)
    factor: float = struct.field(pytree_node=False, default=1.0)
    offset: float = struct.field(pytree_node=False, default=0.0)
    min_probability: float = struct.field(pytree_node=False, default=0.1)
    num_places: int = struct.field(pytree_node=False, default=64)

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"suffix": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(num_drafts=4, max_suffix=6, num_places=8)

    def validate(self, cfg: ModelConfig) -> None:
        if min(self.num_drafts, self.max_suffix, self.num_places) < 1:
            raise ValueError(
                f"num_drafts={self.num_drafts}, max_suffix={self.max_suffix} and num_places="
                f"{self.num_places} must be at least 1"
            )
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"min_probability={self.min_probability} must be in [0, 1]")
        if not self.factor >= 0:
            raise ValueError(f"factor={self.factor} must be at least 0")
        if self.corpus is not None and np.shape(self.corpus) != (np.size(self.corpus),):
            raise ValueError(f"corpus has shape {np.shape(self.corpus)}, which must be [M]")
        if isinstance(self.corpus, Sequence):
            raise ValueError("corpus is a list, which must be an array [M] of token ids")
        if not math.isfinite(self.offset):
            raise ValueError(f"offset={self.offset} must be finite")

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)

    @property
    def num_grades(self) -> int:
        """By how many tokens it expects to be right."""
        return min(8, self.num_drafts + 1)

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        tokens, length = context.tokens, context.length
        drafts, count, score = self._draft(tokens, length, context)
        if self.corpus is not None:
            corpus = jnp.broadcast_to(self.corpus[None], (len(length), *self.corpus.shape))
            ends = jnp.full_like(length, self.corpus.shape[0])
            others = self._draft(corpus, ends, context)
            is_better = others[2] > score
            drafts = jnp.where(is_better[:, None], others[0], drafts)
            count = jnp.where(is_better, others[1], count)
            score = jnp.maximum(score, others[2])
        is_valid = jnp.arange(self.num_drafts + 1)[None] <= count[:, None]
        tree = self.shape.tree(jnp.concatenate([context.root[:, None], drafts], axis=1), is_valid)
        grade = jnp.minimum(jnp.round(score).astype(jnp.int32), self.num_grades - 1)
        return Proposal(tree, spent(context, 0), state, grade=grade)

    def _draft(
        self, source: jax.Array, end: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The best draft from what stands in `source` [B, M] before `end` [B].

        Returns:
          Tokens [B, J], how many there are [B], and the sum of their probabilities [B].
        """
        M = source.shape[1]
        matched = match_lengths(source, context.tokens, context.length, self.max_suffix)
        slot = jnp.arange(M)[None]
        matched = jnp.where(slot < end[:, None], matched, 0)
        best, place = jax.lax.top_k(matched * (M + 1) + slot, min(self.num_places, M))
        of_place = best // (M + 1)  # [B, O]
        suffix = jnp.arange(self.max_suffix, 0, -1)  # [Q], the longest first
        is_left = of_place[:, None] >= suffix[None, :, None]  # [B, Q, O]
        limit = jnp.minimum(self.num_drafts, jnp.floor(self.factor * suffix + self.offset))

        def step(carry: _Followed) -> _Followed:
            j, is_left, probability, said, probabilities = carry
            at = place + 1 + j
            token = jnp.take_along_axis(source, jnp.minimum(at, M - 1), axis=1)  # [B, O]
            is_text = (at < end[:, None]) & (token >= 0)
            same = (token[:, :, None] == token[:, None]) & is_text[:, None]  # [B, O, O]
            votes = is_left.astype(jnp.float32) @ same.swapaxes(1, 2).astype(jnp.float32)
            votes = jnp.where(is_left & is_text[:, None], votes, 0)  # [B, Q, O]
            chosen = jnp.argmax(votes, axis=2)[..., None]  # of equals, the latest of the longest
            most = jnp.take_along_axis(votes, chosen, axis=2)[..., 0]
            probability *= most / jnp.maximum(is_left.sum(axis=2), 1)
            goes_on = (probability >= self.min_probability) & (j < limit[None]) & (most > 0)
            probability = jnp.where(goes_on, probability, 0)
            following = jnp.take_along_axis(
                jnp.broadcast_to(token[:, None], votes.shape), chosen, axis=2
            )
            is_left &= is_text[:, None] & (token[:, None] == following)
            said = said.at[j].set(following[..., 0])
            return j + 1, is_left, probability, said, probabilities.at[j].set(probability)

        (B, Q), J = is_left.shape[:2], self.num_drafts
        start = (
            jnp.zeros((), jnp.int32), is_left, jnp.ones((B, Q)), jnp.zeros((J, B, Q), jnp.int32),
            jnp.zeros((J, B, Q)),
        )  # fmt: skip
        _, _, _, said, probabilities = jax.lax.while_loop(  # most suffixes come up nowhere
            lambda carry: (carry[0] < J) & (carry[2] > 0).any(), step, start
        )
        scores = probabilities.sum(axis=0)  # [B, Q]
        best = jnp.argmax(scores, axis=1)[:, None]
        of_best = lambda x: jnp.take_along_axis(x, best[None], axis=2)[..., 0].T  # noqa: E731
        drafts, kept = of_best(said), of_best(probabilities) > 0
        score = jnp.take_along_axis(scores, best, axis=1)[:, 0]
        return drafts, kept.sum(axis=1), score
