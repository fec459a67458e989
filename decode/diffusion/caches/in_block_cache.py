"""The exact cache of earlier blocks, and an approximate one inside of the open block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.caches.canvas import Canvas, gather
from decode.diffusion.caches.exact_blocks import ExactBlocks, ExactBlocksState
from decode.diffusion.contracts import check_range
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.models.decoder import forward
from dlm.params import Params
from dlm.window import Slots, Window

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


@struct.dataclass
class InBlockState:
    """State of `InBlockCache`.

    Attributes:
      blocks: the exact cache, and the open block as of its last forward over all of it.
      part: [B] int32. First canvas position of the sub-block that may run alone; -1: none.
    """

    blocks: ExactBlocksState
    part: jax.Array


@struct.dataclass
class InBlockCache(ExactBlocks):
    """Approximate: in the open block, all but the open sub-block is cached. Before it, it is exact.

    A sub-block's first forward, and all until its first position is decided, run over the whole
    block and cache it. The others run over the sub-block alone and read the rest of the block, of
    which what stands to the right is stale. Which forward it is goes row by row, and rows wait for
    those of the other kind, as in `DualCache`.

    The very first forward of a block of which nothing is known does not count as its first
    sub-block's: it may decide the first position only (`SubBlocks.first_alone`).

    Needs blocks that are decided in parts of `sub_len` (`SubBlocks`), and nothing that looks at the
    rest of the block.

    Reference: Wu et al., "Fast-dLLM v2: Efficient Block-Diffusion LLM", arXiv:2509.26328, section
    3.3 (`use_block_cache` of the public code).

    Attributes:
      block_len: >= 1, positions per block, as trained. Static.
      aligned: see `ExactBlocks`. Static.
      sub_len: in [1, block_len], positions per sub-block. Static.
      quorum: in [0, 1], as for `DualCache`.
    """

    sub_len: int = struct.field(pytree_node=False, default=8)
    quorum: jax.Array | float = 1.0

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        check_range("sub_len", self.sub_len, 1, self.block_len)
        check_range("quorum", self.quorum, 0, 1)

    def refuse(self, method: DiffusionMethod) -> str | None:
        if (reason := super().refuse(method)) is not None:
            return reason
        if method.scheduler.part_len != self.sub_len:
            return (
                f"InBlockCache(sub_len={self.sub_len}) runs over one part of a block: use a "
                f"scheduler that decides blocks in parts of {self.sub_len}"
            )
        if method.reviser.changes:
            return (
                f"{method.reviser.name} looks at the whole block, of which InBlockCache recomputes "
                "only a part: use another cache"
            )
        return None

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> InBlockState:
        blocks = self.allocate_blocks(cfg, batch_size, num_slots)
        return InBlockState(blocks, jnp.full(batch_size, -1, jnp.int32))

    def judge(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        window_len: int,
        state: InBlockState,
    ) -> tuple[jax.Array, InBlockState, jax.Array]:
        S = canvas.tokens.shape[1]
        place = jnp.arange(S)[None]
        first = self.first(canvas)
        here = (place >= canvas.block_start[:, None]) & (place < canvas.block_end[:, None])
        leftmost = jnp.argmax(canvas.undecided & here, axis=-1)
        part = first + (leftmost - first) // self.sub_len * self.sub_len
        at = jnp.clip(part, 0, S - 1)[:, None]
        is_open = jnp.take_along_axis(canvas.undecided, at, axis=1)[:, 0]

        waiting = canvas.is_active & (is_open | (state.part != part))
        ready = canvas.is_active & ~waiting
        enough = waiting.sum() >= self.quorum * canvas.is_active.sum()
        refresh_now = waiting.any() & (enough | ~ready.any())
        counts = waiting & ~(canvas.block_is_new & is_open & (part == first))

        def refresh(state: InBlockState) -> tuple[jax.Array, InBlockState]:
            rows = canvas.replace(is_active=waiting)
            hidden, blocks, _ = self.judge_blocks(
                params, cfg, rows, window_len, state.blocks, keep_open=True
            )
            return hidden, InBlockState(blocks, jnp.where(counts, part, state.part))

        def reuse(state: InBlockState) -> tuple[jax.Array, InBlockState]:
            hidden = self._run_part(params, cfg, canvas, part, first, state.blocks.kv)
            at = canvas.window_start - part - int(cfg.shifted_logits)
            index = jnp.clip(at[:, None] + jnp.arange(window_len)[None], 0, self.sub_len - 1)
            return jnp.take_along_axis(hidden, index[..., None], axis=1), state

        hidden, state = jax.lax.cond(refresh_now, refresh, reuse, state)
        return hidden, state, jnp.where(refresh_now, waiting, ready)

    def _run_part(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        part: jax.Array,
        first: jax.Array,
        kv: KVCache,
    ) -> jax.Array:
        """[B, sub_len, D]: a forward over the sub-blocks at `part` of the blocks at `first`."""
        C, n = self.block_len, self.sub_len
        window = Window(
            tokens=gather(canvas.tokens, part, n),
            positions=(part - canvas.start)[:, None] + jnp.arange(n)[None],
            range=jnp.stack([canvas.start, jnp.minimum(canvas.end, first + C)], axis=-1)
            - part[:, None],
        )
        before = jnp.stack([canvas.start, part], axis=-1)
        after = jnp.stack([part + n, jnp.minimum(canvas.end, first + C)], axis=-1)
        ranges = jnp.stack([before, after], axis=1)
        return forward(params, cfg, window, Slots(kv, ranges, length=canvas.length)).hidden
