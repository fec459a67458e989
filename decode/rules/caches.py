"""Which positions a forward recomputes: none cached, prefix cache, dual cache.

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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.rules.contracts import Component, check_range
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.transformer import ForwardOutput, forward
from kernels_pallas.window_attention import Mask, pack_mask


class Canvas(struct.PyTreeNode):
    """What a cache policy is given: the canvas and where each row works on it.

    Attributes:
      tokens: [B, S] int32. Left-padded prompts, then completions.
      start: [B] int32. First real position.
      end: [B] int32. Past the last real position.
      block_start: [B] int32. First position of the row's open block.
      block_end: [B] int32. Past its last position.
      is_active: [B] bool. Rows that are not done.
      block_is_new: [B] bool. Rows whose block was opened and not seen by a forward yet.
      mix: [B, S] and [B, S, D] float32: what embeddings are mixed with, see `forward`; None:
        nothing.
      window_start: [B] int32. First of the W positions to be judged: `block_start`, or P.
      prompt_len: P, the position at which every row's completion starts. Static.
      has_shadow: whether W more positions are wanted, see `_add_shadow`. Static.
    """

    tokens: jax.Array
    start: jax.Array
    end: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    is_active: jax.Array
    block_is_new: jax.Array
    mix: tuple[jax.Array, jax.Array] | None
    window_start: jax.Array
    prompt_len: int = struct.field(pytree_node=False)
    has_shadow: bool = struct.field(pytree_node=False)


class CachePolicy(Component):
    """Runs the model for one round.

    Attributes:
      covers: the most that its forwards show: the "block", the "suffix" too, or the "canvas".
      follow_up: bit-faithful to the first public Fast-dLLM, which made a cached forward in every
        block even when the refresh had already filled it.
    """

    covers: ClassVar[str] = "canvas"
    follow_up: bool = False

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Any:
        """The state the policy carries: a pytree, allocated once and donated."""
        raise NotImplementedError

    def judge(
        self, params: Params, cfg: ModelConfig, canvas: Canvas, window_len: int, state: Any
    ) -> tuple[jax.Array, Any, jax.Array]:
        """One forward.

        Returns hidden [B, W, D], the states that predict the W positions from `window_start` on,
        and with a shadow [B, 2 W, D], those of the shadow after them; the next state; and served
        [B] bool, the rows this forward was for.
        """
        raise NotImplementedError


@struct.dataclass
class NoCache(CachePolicy):
    """Every forward runs over the whole canvas. Exact."""

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Any:
        return ()

    def judge(
        self, params: Params, cfg: ModelConfig, canvas: Canvas, window_len: int, state: Any
    ) -> tuple[jax.Array, Any, jax.Array]:
        hidden = _forward_canvas(params, cfg, canvas, window_len).hidden
        return _predictions(hidden, cfg, canvas, window_len), state, canvas.is_active


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
      follow_up: see `CachePolicy`.
    """

    quorum: jax.Array | float = 1.0
    follow_up: bool = struct.field(pytree_node=False, default=False)

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
            out = _forward_canvas(params, cfg, canvas, window_len, state.kv, waiting)
            assert out.cache is not None
            boundary = state.boundary
            if boundary is not None:
                before = _gather(out.hidden, canvas.block_start - 1, 1)[:, 0]
                boundary = jnp.where(waiting[:, None], before, boundary)
            hidden = _predictions(out.hidden, cfg, canvas, window_len)
            return hidden, BlockCacheState(kv=out.cache, boundary=boundary)

        def reuse(state: BlockCacheState) -> tuple[jax.Array, BlockCacheState]:
            span = self.span(canvas, window_len)
            hidden = _forward_span(params, cfg, canvas, span, state.kv, window_len)
            hidden, shadow = hidden[:, : span.length], hidden[:, span.length :]
            if span.before:  # with shifted logits position i-1 predicts token i
                at = canvas.block_start - span.start - int(cfg.shifted_logits)
                hidden = _gather(hidden, at, window_len)
            elif state.boundary is not None:
                hidden = jnp.concatenate([state.boundary[:, None], hidden], axis=1)
            return jnp.concatenate([hidden[:, :window_len], shadow], axis=1), state

        hidden, state = jax.lax.cond(refresh_now, refresh, reuse, state)
        return hidden, state, jnp.where(refresh_now, waiting, ready)

    def span(self, canvas: Canvas, window_len: int) -> Span:
        """What is recomputed between refreshes."""
        raise NotImplementedError


@struct.dataclass
class PrefixCache(BlockCache):
    """Approximate: what stands before the open block is cached; block and suffix are recomputed."""

    covers: ClassVar[str] = "suffix"

    def span(self, canvas: Canvas, window_len: int) -> Span:
        longest = canvas.tokens.shape[1] - canvas.prompt_len  # suffix: one whole completion
        return Span(start=canvas.block_start, stop=canvas.end, length=longest)


@struct.dataclass
class DualCache(BlockCache):
    """Approximate: everything but the open block is cached, the masked suffix too."""

    covers: ClassVar[str] = "block"

    def span(self, canvas: Canvas, window_len: int) -> Span:
        return Span(start=canvas.block_start, stop=canvas.block_end, length=window_len)


def _forward_canvas(
    params: Params,
    cfg: ModelConfig,
    canvas: Canvas,
    window_len: int,
    kv: KVCache | None = None,
    write_rows: jax.Array | None = None,
) -> ForwardOutput:
    """A forward over all S positions; with a cache, `write_rows` of it are refreshed.

    A shadow follows them. It is written to the cache too, past the S slots that are ever read.
    """
    B, S = canvas.tokens.shape
    window = _Window(
        tokens=canvas.tokens,
        positions=jnp.arange(S)[None] - canvas.start[:, None],
        window_range=jnp.stack([canvas.start, canvas.end], axis=-1),
        mix=canvas.mix,
    )
    if canvas.has_shadow:
        window = _add_shadow(window, cfg, canvas, canvas.window_start, window_len)
    return forward(
        params,
        cfg,
        **vars(window),
        cache=kv,
        write_at=None if kv is None else jnp.zeros(B, jnp.int32),
        write_rows=write_rows,
    )


def _forward_span(
    params: Params, cfg: ModelConfig, canvas: Canvas, span: Span, kv: KVCache, window_len: int
) -> jax.Array:
    """[B, span.length, D]: a forward over a span, reading the rest of the row from the cache.

    Positions at or past `span.stop` are not attended to; their hidden states mean nothing. A shadow
    makes it [B, span.length + window_len, D].
    """
    window = _Window(
        tokens=_gather(canvas.tokens, span.start, span.length),
        positions=(span.start - canvas.start)[:, None] + jnp.arange(span.length)[None],
        window_range=jnp.stack([jnp.zeros_like(span.stop), span.stop - span.start], axis=-1),
        mix=jax.tree.map(lambda x: _gather(x, span.start, span.length), canvas.mix),
    )
    if canvas.has_shadow:
        window = _add_shadow(window, cfg, canvas, canvas.block_start - span.start, window_len)
    before = jnp.stack([canvas.start, span.start], axis=-1)
    behind = jnp.stack([span.stop, canvas.end], axis=-1)
    ranges = jnp.stack([before, behind], axis=1)
    return forward(params, cfg, **vars(window), cache=kv, cache_ranges=ranges).hidden


@dataclasses.dataclass(frozen=True)
class _Window:
    """Arguments of `forward` that describe what it runs over."""

    tokens: jax.Array
    positions: jax.Array
    window_range: jax.Array | None
    mix: tuple[jax.Array, jax.Array] | None
    mask: Mask = "full"


def _add_shadow(
    window: _Window, cfg: ModelConfig, canvas: Canvas, at: jax.Array, length: int
) -> _Window:
    """Appends `length` MASK tokens that stand where window positions at [B], at + 1, ... stand.

    A shadow sees the window except the position it stands at, and the other shadows of the block;
    nobody else sees shadows. So it says what the model would predict at a position if it had not
    been decided. Reference: Hong et al., "Wide-In, Narrow-Out" (WINO), arXiv:2507.18578, section 3.
    """
    B, T = window.tokens.shape
    assert window.window_range is not None and cfg.mask_token_id is not None
    index = at[:, None] + jnp.arange(length)[None]  # [B, W], in the window
    first, stop = window.window_range[:, :1], window.window_range[:, 1:]
    column = jnp.arange(T)[None]
    real = jnp.broadcast_to(((column >= first) & (column < stop))[:, None], (B, T + length, T))
    place = canvas.window_start[:, None] + jnp.arange(length)[None]
    in_block = (place >= canvas.block_start[:, None]) & (place < canvas.block_end[:, None])
    sees_shadow = jnp.concatenate(
        [jnp.zeros((B, T, length), bool), jnp.broadcast_to(in_block[:, None], (B, length, length))],
        axis=1,
    )
    other = jnp.concatenate(
        [jnp.ones((B, T, T), bool), column[:, None] != index[:, :, None]], axis=1
    )
    own = jnp.take_along_axis(window.positions, jnp.minimum(index, T - 1), axis=1)
    return _Window(
        tokens=jnp.pad(window.tokens, ((0, 0), (0, length)), constant_values=cfg.mask_token_id),
        positions=jnp.concatenate([window.positions, own], axis=1),
        window_range=None,
        mix=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length), (0, 0))[: x.ndim]), window.mix),
        mask=pack_mask(jnp.concatenate([real & other, sees_shadow], axis=-1)),
    )


def _predictions(hidden: jax.Array, cfg: ModelConfig, canvas: Canvas, window_len: int) -> jax.Array:
    """Of hidden states of the whole canvas, those that predict the window; and the shadow's."""
    window = _gather(hidden, canvas.window_start - int(cfg.shifted_logits), window_len)
    return jnp.concatenate([window, hidden[:, canvas.tokens.shape[1] :]], axis=1)


def _gather(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """[B, length, ...]: x[b, start[b] : start[b] + length]; past the end, the last entry."""
    index = jnp.minimum(start[:, None] + jnp.arange(length)[None], x.shape[1] - 1)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)
