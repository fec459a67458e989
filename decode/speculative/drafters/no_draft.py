"""Nobody drafts: plain autoregressive decoding, one token per forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import struct

from decode.speculative.contracts import Context, Drafter
from decode.speculative.tree import DraftTree, TreeShape, chain
from dlm.config import ModelConfig


@struct.dataclass
class NoDraft(Drafter):
    """The tree is its root."""

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"plain": cls()}

    @property
    def shape(self) -> TreeShape:
        return chain(0)

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> tuple[DraftTree, Any]:
        return self.shape.tree(context.root[:, None]), state
