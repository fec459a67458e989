"""Blocks decoded part by part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Points
from decode.diffusion.round import Round
from decode.diffusion.schedulers.blocks import BlocksOfOneLength
from dlm.config import ModelConfig


@struct.dataclass
class SubBlocks(BlocksOfOneLength):
    """Blocks of `block_len`, in each of which the leftmost unfinished sub-block is eligible.

    The block stays what is cached and refreshed; sub-blocks only order commits. They are counted
    from the start of the open block.

    Reference: Wu et al., "Fast-dLLM v2: Efficient Block-Diffusion LLM", arXiv:2509.26328, section
    3.3 (block 32, sub-block 8).

    Attributes:
      block_len: >= 1, positions per block; None: the whole completion. Static.
      sub_len: >= 1, positions per sub-block. Static.
      aligned: as for `FixedBlocks`. Static.
    """

    sub_len: int = struct.field(pytree_node=False, default=8)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"sub_blocks": {"scheduler": cls(block_len, max(block_len // 4, 1))}}

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if not 1 <= self.sub_len <= (self.block_len or self.sub_len):
            raise ValueError(f"sub_len={self.sub_len} must be in [1, block_len={self.block_len}]")

    def focus(self, round: Round, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        part = (round.index - round.block_start[:, None]) // self.sub_len
        leftmost = jnp.where(round.eligible, part, jnp.iinfo(jnp.int32).max).min(axis=-1)
        return round.eligible & (part == leftmost[:, None]), round.block_end, state
