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
    from the start of the block, which for aligned blocks may be inside the prompt.

    Reference: Wu et al., "Fast-dLLM v2: Efficient Block-Diffusion LLM", arXiv:2509.26328, section
    3.3 (block 32, sub-block 8).

    Attributes:
      block_len: >= 1, positions per block; None: the whole completion. Static.
      sub_len: >= 1, positions per sub-block. Static.
      aligned: as for `FixedBlocks`. Static.
      first_alone: whether the first position of a block is decided alone, before the others see it.
        Where logits are shifted it is predicted from the block before, and the others were never
        trained without it (Fast-dLLM v2). Static.
    """

    sub_len: int = struct.field(pytree_node=False, default=8)
    first_alone: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"sub_blocks": {"scheduler": cls(block_len, max(block_len // 4, 1))}}

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if not 1 <= self.sub_len <= (self.block_len or self.sub_len):
            raise ValueError(f"sub_len={self.sub_len} must be in [1, block_len={self.block_len}]")

    @property
    def part_len(self) -> int:
        return self.sub_len

    def focus(self, round: Round, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        behind = round.prompt_len + round.block_start if self.aligned else 0
        origin = round.block_start - behind % (self.block_len or 1)
        place = round.index - origin[:, None]
        part = place // self.sub_len
        leftmost = jnp.where(round.eligible, part, jnp.iinfo(jnp.int32).max).min(axis=-1)
        eligible = round.eligible & (part == leftmost[:, None])
        if self.first_alone:
            first = eligible & (place == 0)
            eligible = jnp.where(first.any(axis=-1, keepdims=True), first, eligible)
        return eligible, round.block_end, state
