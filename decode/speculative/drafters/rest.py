"""REST: what followed the end of the text in a datastore, as a tree of the most frequent ways.

Reference: He et al., "REST: Retrieval-Based Speculative Decoding", arXiv:2311.08252, Sec. 3, and
the public code. Of the suffixes of the text with `max_suffix` to `min_suffix` tokens the longest
one that a large store of texts holds is looked for in its suffix array; of what stands behind its
places, some thousand of them, the most frequent beginnings make the tree.

The publication looks on the host; here store and search are on the device, in the loop. Where
there are more places than are read, these are spread evenly over all, in their order. Where there
is none, nothing is drafted.

Letters: B rows, W nodes, J depth, C places, N suffixes.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.datastore import SORTED_BY, Datastore, sort_suffixes
from decode.core.requests import made_by
from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig
from dlm.params import Params


@struct.dataclass
class REST(Drafter):
    """A tree of what a datastore holds behind the end of the text; nothing is trained.

    Attributes:
      datastore: of `datastore.load_datastore`, on the device: 8 bytes per token.
      num_drafts: >= 1, W - 1. Static.
      draft_len: J >= 1, tokens that are read behind each place. Static.
      max_suffix: >= 1, longest suffix that is looked for, in tokens. Static.
      min_suffix: >= 1, shortest. Static.
      num_places: C >= 1. Static.
    """

    datastore: Datastore
    num_drafts: int = struct.field(pytree_node=False, default=64)
    draft_len: int = struct.field(pytree_node=False, default=10)
    max_suffix: int = struct.field(pytree_node=False, default=16)
    min_suffix: int = struct.field(pytree_node=False, default=2)
    num_places: int = struct.field(pytree_node=False, default=5000)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        """Of a short text of few tokens."""
        text = np.random.default_rng(0).integers(0, min(cfg.vocab_size, 8), 300).astype(np.int32)
        suffixes = sort_suffixes(text, SORTED_BY)
        store = Datastore(jnp.asarray(text), jnp.asarray(suffixes), cfg.vocab_size)
        return cls(store, num_drafts=6, draft_len=3, max_suffix=4, min_suffix=1, num_places=8)

    def validate(self, cfg: ModelConfig) -> None:
        for name in ("num_drafts", "draft_len", "num_places"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 1 <= self.min_suffix <= self.max_suffix:
            raise ValueError(
                f"min_suffix={self.min_suffix} must be at least 1 and at most "
                f"max_suffix={self.max_suffix}"
            )
        if self.max_suffix + self.draft_len > SORTED_BY:
            raise ValueError(
                f"max_suffix={self.max_suffix} and draft_len={self.draft_len} must be at most "
                f"{SORTED_BY} together, by which the datastore is sorted"
            )
        made_by("datastore", self.datastore, Datastore, "load_datastore")
        self.datastore.validate(cfg)

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def num_nodes(self) -> int:
        return self.num_drafts + 1

    @property
    def depth(self) -> int:
        return self.draft_len

    @property
    def num_grades(self) -> int:
        """By how many tokens agree."""
        return self.max_suffix - self.min_suffix + 1

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        slot, num, grade = self._places(context)
        behind = self.datastore.read(slot, self.draft_len)  # [B, C, J]
        return Proposal(
            self._tree(context.root, behind, num), spent(context, 0), state, grade=grade
        )

    def _places(self, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Slots [B, C] behind the longest suffix, how many there are [B], and its grade [B]."""
        n, C = self.max_suffix, self.num_places
        length = jnp.arange(n, self.min_suffix - 1, -1)  # [N], the longest first
        place = context.length[:, None, None] - length[None, :, None] + jnp.arange(n)[None, None]
        rows = jnp.arange(len(place))[:, None, None]
        pattern = context.tokens[rows, jnp.maximum(place, 0)]
        first, last = self.datastore.find(pattern, length)
        is_found = (last > first) & (length[None] <= context.length[:, None])
        best = jnp.argmax(is_found, axis=1)[:, None]
        of = lambda x: jnp.take_along_axis(x, best, axis=1)  # noqa: E731
        total = jnp.where(is_found.any(axis=1), of(last - first)[:, 0], 0)
        num = jnp.minimum(total, C)
        # Evenly: (i total) // num, in numbers that have no overflow.
        i, among = jnp.arange(C)[None], jnp.maximum(num, 1)[:, None]
        index = i * (total[:, None] // among) + (i * (total[:, None] % among)) // among
        found = jnp.minimum(of(first) + index, len(self.datastore.suffixes) - 1)
        slot = self.datastore.suffixes[found] + length[best]
        return slot, num, jnp.where(total > 0, len(length) - 1 - best[:, 0], 0)

    def _tree(self, root: jax.Array, behind: jax.Array, num: jax.Array) -> DraftTree:
        """The most frequent beginnings of the first `num` [B] of sorted texts [B, C, J].

        Texts that begin alike are neighbours, so a beginning is a run of them, and its node is
        named by the run's first text.
        """
        B, C, J = behind.shape
        i = jnp.arange(C, dtype=jnp.int32)[None, :, None]
        is_other = behind[:, 1:] != behind[:, :-1]
        is_other = jnp.pad(is_other, ((0, 0), (1, 0), (0, 0)), constant_values=True)
        begins = jnp.cumsum(is_other, axis=2) > 0  # [B, C, J]: a run of j + 1 tokens
        exists = (jnp.cumsum(behind < 0, axis=2) == 0) & (i < num[:, None, None])
        start = jax.lax.cummax(jnp.where(begins, i, 0), axis=1)
        following = jnp.where(begins, i, C)[:, 1:]
        following = jnp.pad(following, ((0, 0), (0, 1), (0, 0)), constant_values=C)
        end = jnp.minimum(jax.lax.cummin(following, axis=1, reverse=True), num[:, None, None])
        # Of equals the shorter one: parents come before their children.
        j = jnp.arange(J, dtype=jnp.int32)[None, None]
        merit = jnp.where(begins & exists, (end - i) * J + (J - 1 - j), -1).reshape(B, -1)
        most, node = jax.lax.top_k(merit, min(self.num_drafts, C * J))
        node = node.astype(jnp.int32)
        of = lambda x: jnp.take_along_axis(x.reshape(B, -1), node, axis=1)  # noqa: E731
        above = jnp.pad(start[:, :, :-1] * J + j[:, :, 1:] - 1, ((0, 0), (0, 0), (1, 0)))
        is_parent = of(above)[:, :, None] == node[:, None]
        depth = jnp.where(most >= 0, node % J + 1, 1)
        parent = jnp.where(depth > 1, jnp.argmax(is_parent, axis=2).astype(jnp.int32) + 1, 0)
        missing = self.num_drafts - node.shape[1]

        def below(of_root: jax.Array, x: jax.Array, fill: int) -> jax.Array:
            x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
            return jnp.concatenate([of_root[:, None], x], axis=1)

        zero = jnp.zeros_like(root)
        return DraftTree(
            tokens=below(root, of(behind), 0),
            parents=below(zero - 1, parent, 0),
            depths=below(zero, depth, 1),
            is_valid=below(zero == 0, most >= 0, 0),
        )
