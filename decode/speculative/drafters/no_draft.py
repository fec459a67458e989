"""Nobody drafts: plain autoregressive decoding, one token per forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import struct

from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig


@struct.dataclass
class NoDraft(Drafter):
    """Plain decoding: the tree is its root."""

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"plain": cls()}

    @property
    def shape(self) -> TreeShape:
        return chain(0)

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        return Proposal(self.shape.tree(context.root[:, None]), spent(context, 0), state)
