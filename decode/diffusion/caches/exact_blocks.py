"""What caches of block-diffusion models share: all but the open block is exact.

A position sees its own block and all before it, so a finished block never changes. A forward runs
over the open blocks, one or several, and reads everything earlier from the cache. Blocks that were
finished in the round before are settled there first, with their final tokens: the round that
follows runs over them too. It does so for all rows; rounds in which nobody's block is new are half
as long. The prompt is filled in before a row's first round, by a forward that `num_forwards` does
not count.

Letters: B rows, W window positions, D model width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.caches.canvas import CachePolicy, Canvas
from decode.diffusion.contracts import check_range
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.models.decoder import forward
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


@struct.dataclass
class ExactBlocksState:
    """State of `ExactBlocks`.

    Attributes:
      kv: keys and values; canvas position i is slot i.
      is_filled: [B] bool. Whether the row's prompt is there.
    """

    kv: KVCache
    is_filled: jax.Array


@struct.dataclass
class ExactBlocks(CachePolicy):
    """Blocks that never look ahead, cached exactly once they are finished.

    Attributes:
      settles_causally: whether positions of finished blocks, and of the prompt, see no later one of
        their own block either.
      block_len: positions per block, as trained. Static.
      aligned: whether they are counted from the start of the prompt; False: from its end. Static.
    """

    covers: ClassVar[str] = "block"
    looks_ahead: ClassVar[bool] = False
    settles_causally: ClassVar[bool] = False

    block_len: int = struct.field(pytree_node=False, default=32)
    aligned: bool = struct.field(pytree_node=False, default=True)

    def validate(self, cfg: ModelConfig) -> None:
        check_range("block_len", self.block_len, 1, cfg.max_seq_len)

    def refuse(self, method: DiffusionMethod) -> str | None:
        blocks = method.scheduler
        if blocks.is_aligned != self.aligned or blocks.fixed_len != self.block_len:
            return (
                f"{method.cache.name}(block_len={self.block_len}) needs the blocks that the model "
                f"sees: use {'' if self.aligned else 'un'}aligned blocks of {self.block_len}"
            )
        if who := method.who_needs("shadow"):
            return f"{method.cache.name} has no shadow, which {who} needs"
        if not method.inputs.shows_mask or method.inputs.remembers:
            return f"{method.cache.name} shows MASK, and {method.inputs.name} wants something else"
        return None

    def allocate_blocks(
        self, cfg: ModelConfig, batch_size: int, num_slots: int
    ) -> ExactBlocksState:
        """As `allocate`."""
        return ExactBlocksState(init_cache(cfg, batch_size, num_slots), jnp.zeros(batch_size, bool))

    def judge_blocks(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        window_len: int,
        state: ExactBlocksState,
        *,
        keep_open: bool = False,
    ) -> tuple[jax.Array, ExactBlocksState, jax.Array]:
        """As `judge`: a forward over the open blocks, and those to be settled.

        With `keep_open` what it computes of the open blocks is kept in the cache.
        """
        S, kv = canvas.tokens.shape[1], state.kv
        if canvas.prompt_len:
            lacking = canvas.is_active & ~state.is_filled
            fill = lambda kv: self._run(  # noqa: E731
                params, cfg, canvas.replace(is_active=lacking), jnp.zeros_like(canvas.start),
                canvas.prompt_len, kv, None, keep=True,
            )[1]  # fmt: skip
            kv = jax.lax.cond(lacking.any(), fill, lambda kv: kv, kv)
        first, shift = self.first(canvas), int(cfg.shifted_logits)
        span = -(-window_len // self.block_len) * self.block_len  # of open blocks; so many may end

        def run(back: int, keep: bool, kv: KVCache) -> tuple[jax.Array, KVCache]:
            """From `back` positions before the open blocks on."""
            length = min(back + span, S)
            at = jnp.clip(first - back, 0, S - length)
            earlier = jnp.stack([canvas.start, at], axis=-1)[:, None]
            hidden, kv = self._run(params, cfg, canvas, at, length, kv, earlier, keep=keep)
            index = (canvas.window_start - at - shift)[:, None] + jnp.arange(window_len)[None]
            index = jnp.minimum(index, length - 1)
            return jnp.take_along_axis(hidden, index[..., None], axis=1), kv

        # What precedes the first block of a completion is the prompt, which is there.
        is_behind = canvas.block_is_new & (canvas.block_start > canvas.prompt_len)
        settle, go_on = (functools.partial(run, *how) for how in ((span, True), (shift, keep_open)))
        hidden, kv = jax.lax.cond((canvas.is_active & is_behind).any(), settle, go_on, kv)
        return hidden, ExactBlocksState(kv, jnp.ones_like(state.is_filled)), canvas.is_active

    def first(self, canvas: Canvas) -> jax.Array:
        """[B]: where the first open block starts, be it inside the prompt."""
        behind = (canvas.block_start - self._origin(canvas)) % self.block_len
        return canvas.block_start - behind

    def _origin(self, canvas: Canvas) -> jax.Array:
        """[B]: a canvas position at which a block starts."""
        return canvas.start if self.aligned else jnp.full_like(canvas.start, canvas.prompt_len)

    def _run(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        first: jax.Array,
        length: int,
        kv: KVCache,
        cache_ranges: jax.Array | None,
        *,
        keep: bool,
    ) -> tuple[jax.Array, KVCache]:
        """A forward over `length` positions from `first` [B] on; `keep`: they are cached."""
        S = canvas.tokens.shape[1]
        place = first[:, None] + jnp.arange(length)[None]
        block = (place - self._origin(canvas)[:, None]) // self.block_len
        sees = block[:, :, None] >= block[:, None, :]
        if self.settles_causally:
            is_open = place >= self.first(canvas)[:, None]
            sees &= is_open[:, :, None] | (place[:, :, None] >= place[:, None, :])
        window = Window(
            tokens=jnp.take_along_axis(canvas.tokens, jnp.clip(place, 0, S - 1), axis=1),
            positions=place - canvas.start[:, None],
            mask=pack_mask(sees),
            range=jnp.stack([canvas.start, canvas.end], axis=-1) - first[:, None],
        )
        slots = Slots(kv, cache_ranges, first if keep else None, canvas.is_active, canvas.length)
        out = forward(params, cfg, window, slots)
        assert out.cache is not None
        return out.hidden, out.cache
