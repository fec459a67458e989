"""A refresh per block, and windows in between: what the approximate block caches share.

With bidirectional attention every key and value depends on every token, so reusing them is an
approximation. Fast-dLLM's observation is that they change little while one block is decoded: one
full forward refreshes the cache when a block opens (and decodes the block's first step), later
steps run on a window only.

Reference: Wu et al., "Fast-dLLM", arXiv:2505.22618, §3.2.

    tokens      pad | prompt ........ | decided | block .... | masked suffix ....
    no cache          recomputed        recomp.   recomputed   recomputed
    prefix cache      cached            cached    recomputed   recomputed
    dual cache        cached            cached    recomputed   cached

Letters: B rows, S canvas positions, W window positions judged, D model width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.caches.canvas import (
    CachePolicy,
    Canvas,
    add_shadow,
    forward_canvas,
    gather,
    predictions,
)
from decode.diffusion.contracts import check_range
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.models.decoder import forward
from dlm.params import Params
from dlm.window import Slots, Window


@struct.dataclass
class BlockCacheState:
    """State of the approximate block caches.

    Attributes:
      kv: keys and values of the whole canvas, as of each row's last refresh.
      boundary: [B, D]. Hidden state of the position before the open block at that refresh; None
        unless the model's logits are shifted, when it predicts the block's first token.
    """

    kv: KVCache
    boundary: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Span:
    """What a forward recomputes of each row: [start, stop). The rest of the row is cached.

    Attributes:
      start: [B] int32. At or before the open block.
      stop: [B] int32. At or past its end.
      length: the most positions between the two. Static.
      before: the most positions between `start` and the open block. Static.
    """

    start: jax.Array
    stop: jax.Array
    length: int
    before: int = 0


@struct.dataclass
class BlockCache(CachePolicy):
    """What the two approximate block caches share: a refresh per block, windows in between.

    Attributes:
      quorum: in [0, 1]. Rows that need a refresh wait until this share of the active rows does, so
        that one full forward serves them together. Changes no row's tokens or forward count, only
        how many forwards the batch takes: 1 is best where full forwards cost much more than window
        forwards, 0 where they cost the same.
      follow_up: bit-faithful to the first public Fast-dLLM, which made a cached forward in every
        block even when the refresh had already filled it. Static.
    """

    quorum: jax.Array | float = 1.0
    follow_up: bool = struct.field(pytree_node=False, default=False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"second look"} if self.follow_up else ())

    def validate(self, cfg: ModelConfig) -> None:
        check_range("quorum", self.quorum, 0, 1)

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> BlockCacheState:
        shape = (batch_size, cfg.d_model)
        boundary = jnp.zeros(shape, cfg.jnp_dtype) if cfg.shifted_logits else None
        return BlockCacheState(kv=init_cache(cfg, batch_size, num_slots), boundary=boundary)

    def judge(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        window_len: int,
        state: BlockCacheState,
    ) -> tuple[jax.Array, BlockCacheState, jax.Array]:
        """A full forward for rows whose block is new, if enough of them wait; else a window's.

        Either way rows it is not for stand still, which is why they get what they would get alone.
        """
        waiting = canvas.is_active & canvas.block_is_new
        ready = canvas.is_active & ~canvas.block_is_new
        enough = waiting.sum() >= self.quorum * canvas.is_active.sum()
        refresh_now = waiting.any() & (enough | ~ready.any())

        def refresh(state: BlockCacheState) -> tuple[jax.Array, BlockCacheState]:
            out = forward_canvas(params, cfg, canvas, window_len, state.kv, waiting)
            assert out.cache is not None
            boundary = state.boundary
            if boundary is not None:
                before = gather(out.hidden, canvas.block_start - 1, 1)[:, 0]
                boundary = jnp.where(waiting[:, None], before, boundary)
            hidden = predictions(out.hidden, cfg, canvas, window_len)
            return hidden, BlockCacheState(kv=out.cache, boundary=boundary)

        def reuse(state: BlockCacheState) -> tuple[jax.Array, BlockCacheState]:
            span = self.span(canvas, window_len)
            hidden = _forward_span(params, cfg, canvas, span, state.kv, window_len)
            hidden, shadow = hidden[:, : span.length], hidden[:, span.length :]
            if span.before:  # with shifted logits position i-1 predicts token i
                at = canvas.block_start - span.start - int(cfg.shifted_logits)
                hidden = gather(hidden, at, window_len)
            elif state.boundary is not None:
                hidden = jnp.concatenate([state.boundary[:, None], hidden], axis=1)
            return jnp.concatenate([hidden[:, :window_len], shadow], axis=1), state

        hidden, state = jax.lax.cond(refresh_now, refresh, reuse, state)
        return hidden, state, jnp.where(refresh_now, waiting, ready)

    def span(self, canvas: Canvas, window_len: int) -> Span:
        """What is recomputed between refreshes."""
        raise NotImplementedError


def _forward_span(
    params: Params, cfg: ModelConfig, canvas: Canvas, span: Span, kv: KVCache, window_len: int
) -> jax.Array:
    """[B, span.length, D]: a forward over a span, reading the rest of the row from the cache.

    Positions at or past `span.stop` are not attended to; their hidden states mean nothing. A shadow
    makes it [B, span.length + window_len, D].
    """
    window = Window(
        tokens=gather(canvas.tokens, span.start, span.length),
        positions=(span.start - canvas.start)[:, None] + jnp.arange(span.length)[None],
        range=jnp.stack([jnp.zeros_like(span.stop), span.stop - span.start], axis=-1),
        mix=jax.tree.map(lambda x: gather(x, span.start, span.length), canvas.mix),
    )
    if canvas.has_shadow:
        window = add_shadow(window, cfg, canvas, canvas.block_start - span.start, window_len)
    before = jnp.stack([canvas.start, span.start], axis=-1)
    behind = jnp.stack([span.stop, canvas.end], axis=-1)
    ranges = jnp.stack([before, behind], axis=1)
    return forward(params, cfg, window, Slots(kv, ranges, length=canvas.length)).hidden
