"""Nobody drafts: plain autoregressive decoding, one token per forward."""

from __future__ import annotations

from typing import Any, ClassVar

from flax import struct

from decode.drafters.contracts import Context, Drafter
from decode.tree import DraftTree, chain
from dlm.config import ModelConfig


@struct.dataclass
class NoDraft(Drafter):
    """The tree is its root."""

    num_nodes: ClassVar[int] = 1
    depth: ClassVar[int] = 0

    @property
    def is_chain(self) -> bool:
        return True

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> tuple[DraftTree, Any]:
        return chain(0).tree(context.root[:, None]), state
