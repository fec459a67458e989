"""Blocks of one length: what schedulers of such blocks share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Scheduler
from dlm.config import ModelConfig


@struct.dataclass
class BlocksOfOneLength(Scheduler):
    """Blocks of `block_len` positions, left to right; the last one may be shorter.

    Attributes:
      block_len: positions per block; None: one block, the whole completion. Static.
      aligned: whether blocks are counted from the start of the prompt, as block-diffusion models
        need, so that the first one may be shorter too. Static.
    """

    block_len: int | None = struct.field(pytree_node=False, default=32)
    aligned: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def validate(self, cfg: ModelConfig) -> None:
        if self.block_len is not None and self.block_len < 1:
            raise ValueError(f"block_len={self.block_len} must be at least 1")
        if self.block_len is None and self.aligned:
            raise ValueError("aligned=True needs a block_len")

    @property
    def fixed_len(self) -> int | None:
        return self.block_len

    @property
    def is_aligned(self) -> bool:
        return self.aligned

    def window_len(self, gen_len: int) -> int:
        return gen_len if self.block_len is None else min(self.block_len, gen_len)

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        if self.block_len is None:
            return end
        behind = (prompt_len + start) % self.block_len if self.aligned else 0
        return jnp.minimum(start + self.block_len - behind, end)
