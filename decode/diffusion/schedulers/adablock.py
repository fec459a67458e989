"""Blocks that end where the model expects a delimiter."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import Scheduler, check_range
from decode.diffusion.round import Round, log_confidence
from dlm.config import ModelConfig


@struct.dataclass
class AdaBlock(Scheduler):
    """Ends a block on the delimiter its first forward is surest of, if it is sure enough.

    The forward that opens a block looks a share of the completion ahead. Of the positions there
    that propose a delimiter, the most probable one ends the block; if its probability is below
    `threshold`, or there is none, the block has `block_len` positions. No forward is spent on it.

    Reference: Lu et al., "AdaBlock-dLLM: Semantic-Aware Diffusion LLM Inference via Adaptive Block
    Size", arXiv:2509.26432, Alg. 1; `window` as in the public code ("budget") or the paper.

    Attributes:
      delimiter_ids: [n] int32 or a sequence of ints: newline tokens, there.
      block_len: >= 1, positions of a block without delimiter. Static.
      threshold: >= 0; 0.3 for LLaDA, 0.5 for Dream. Above 1: never a delimiter.
      share: in (0, 1], how far it looks ahead (0.25). Static.
      window: "budget": a share of the completion's length; "progress": of the positions from its
        start to the block's first, at least one (paper). Static.
    """

    delimiter_ids: jax.Array | tuple[int, ...]
    block_len: int = struct.field(pytree_node=False, default=32)
    threshold: jax.Array | float = 0.3
    share: float = struct.field(pytree_node=False, default=0.25)
    window: str = struct.field(pytree_node=False, default="budget")

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        return cls((1, 2), block_len=8)

    def validate(self, cfg: ModelConfig) -> None:
        check_range("block_len", self.block_len, 1, float("inf"))
        check_range("threshold", self.threshold, 0, float("inf"))
        check_range("share", self.share, 0, 1, ends="(]")
        if self.window not in ("budget", "progress"):
            raise ValueError(f"window={self.window!r} must be 'budget' or 'progress'")
        ids = np.asarray(self.delimiter_ids, np.int64).reshape(-1)
        if not ids.size:
            raise ValueError("delimiter_ids is empty: give at least one token, or use FixedBlocks")
        for i in ids:
            if not 0 <= i < cfg.vocab_size:
                raise ValueError(f"delimiter id {i} must be in [0, vocab_size={cfg.vocab_size})")

    def window_len(self, gen_len: int) -> int:
        return min(max(self.block_len, int(self.share * gen_len)), gen_len)

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        """As far as the block might go; `focus` settles it."""
        ahead = jnp.floor(self.share * end).astype(jnp.int32)
        return jnp.minimum(start + jnp.maximum(ahead, self.block_len), end)

    def focus(self, round: Round, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        start, left = round.block_start, round.gen_len - round.block_start
        reach = round.gen_len if self.window == "budget" else start
        ahead = jnp.floor(self.share * reach).astype(jnp.int32)
        ahead = ahead if self.window == "budget" else jnp.maximum(ahead, 1)
        place = round.index - start[:, None]
        ids = jnp.asarray(self.delimiter_ids, jnp.int32).reshape(-1)
        is_delimiter = (round.proposal[..., None] == ids[None, None]).any(axis=-1)
        is_delimiter &= (place >= 0) & (place < jnp.minimum(ahead, left)[:, None])
        sure = jnp.where(is_delimiter, round.log_prob, -jnp.inf)
        best = jnp.argmax(sure, axis=-1)  # the leftmost on ties
        found = is_delimiter.any(axis=-1) & (sure.max(axis=-1) >= log_confidence(self.threshold))
        on_delimiter = jnp.take_along_axis(round.index, best[:, None], axis=-1)[:, 0] + 1
        settled = jnp.where(found, on_delimiter, start + jnp.minimum(self.block_len, left))
        block_end = jnp.where(round.block_step == 0, settled, round.block_end)
        return round.eligible & (round.index < block_end[:, None]), block_end, state
