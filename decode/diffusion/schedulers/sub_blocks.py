"""Blocks decoded part by part."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Points, Scheduler
from decode.diffusion.round import Round
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from dlm.config import ModelConfig


@struct.dataclass
class SubBlocks(Scheduler):
    """Blocks of `block_len`, in each of which the leftmost unfinished sub-block is eligible.

    The block stays what is cached and refreshed; sub-blocks only order commits. They are counted
    from the start of the block, which for aligned blocks may be inside the prompt.

    Reference: Wu et al., "Fast-dLLM v2: Efficient Block-Diffusion LLM", arXiv:2509.26328, section
    3.3 (block 32, sub-block 8).

    Attributes:
      block_len: positions per block; None: the whole completion. Static.
      sub_len: positions per sub-block. Static.
      aligned: as for `FixedBlocks`. Static.
      first_alone: whether the first position of a block is decided alone, before the others see it.
        Where logits are shifted it is predicted from the block before, and the others were never
        trained without it (Fast-dLLM v2). Static.
    """

    block_len: int | None = struct.field(pytree_node=False, default=32)
    sub_len: int = struct.field(pytree_node=False, default=8)
    aligned: bool = struct.field(pytree_node=False, default=False)
    first_alone: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"sub_blocks": {"scheduler": cls(block_len, max(block_len // 4, 1))}}

    def validate(self, cfg: ModelConfig) -> None:
        self._blocks.validate(cfg)
        if not 1 <= self.sub_len <= (self.block_len or self.sub_len):
            raise ValueError(f"sub_len={self.sub_len} must be in [1, block_len={self.block_len}]")

    @property
    def _blocks(self) -> FixedBlocks:
        return FixedBlocks(self.block_len, self.aligned)

    @property
    def fixed_len(self) -> int | None:
        return self.block_len

    @property
    def is_aligned(self) -> bool:
        return self.aligned

    @property
    def part_len(self) -> int:
        return self.sub_len

    def window_len(self, gen_len: int) -> int:
        return self._blocks.window_len(gen_len)

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        return self._blocks.open_block(start, end, prompt_len)

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
