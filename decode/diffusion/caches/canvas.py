"""What a cache policy is given, and a forward over all of it.

Letters: B rows, S canvas positions, T and W window positions, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Component
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.models.decoder import ForwardOutput, forward
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask


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
      undecided: [B, S] bool. Completion positions that hold no token yet.
      mix: [B, S] and [B, S, D] float32: what embeddings are mixed with, see `forward`; None:
        nothing.
      window_start: [B] int32. First of the W positions to be judged: `block_start`, or P.
      prompt_len: P, the position at which every row's completion starts. Static.
      has_shadow: whether W more positions are wanted, see `add_shadow`. Static.
    """

    tokens: jax.Array
    start: jax.Array
    end: jax.Array
    block_start: jax.Array
    block_end: jax.Array
    is_active: jax.Array
    block_is_new: jax.Array
    undecided: jax.Array
    mix: tuple[jax.Array, jax.Array] | None
    window_start: jax.Array
    prompt_len: int = struct.field(pytree_node=False)
    has_shadow: bool = struct.field(pytree_node=False)

    @property
    def length(self) -> jax.Array:
        """[B] int32. Positions of each row's text, prompt and completion."""
        return self.end - self.start


class CachePolicy(Component):
    """Runs the model for one round.

    Attributes:
      covers: the most that its forwards show: the "block", the "suffix" too, or the "canvas".
      looks_ahead: whether positions of a block see what stands behind it.
    """

    covers: ClassVar[str] = "canvas"
    looks_ahead: ClassVar[bool] = True

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


def forward_canvas(
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
    window = Window(
        tokens=canvas.tokens,
        positions=jnp.arange(S)[None] - canvas.start[:, None],
        range=jnp.stack([canvas.start, canvas.end], axis=-1),
        mix=canvas.mix,
    )
    if canvas.has_shadow:
        window = add_shadow(window, cfg, canvas, canvas.window_start, window_len)
    slots = None
    if kv is not None:
        start = jnp.zeros(B, jnp.int32)
        slots = Slots(kv, write_at=start, write_rows=write_rows, length=canvas.length)
    return forward(params, cfg, window, slots)


def add_shadow(
    window: Window, cfg: ModelConfig, canvas: Canvas, at: jax.Array, length: int
) -> Window:
    """Appends `length` MASK tokens that stand where window positions at [B], at + 1, ... stand.

    A shadow sees the window except the position it stands at, and the other shadows of the block;
    nobody else sees shadows. So it says what the model would predict at a position if it had not
    been decided. Reference: Hong et al., "Wide-In, Narrow-Out" (WINO), arXiv:2507.18578, section 3.
    """
    B, T = window.tokens.shape
    assert window.range is not None and cfg.mask_token_id is not None
    index = at[:, None] + jnp.arange(length)[None]  # [B, W], in the window
    first, stop = window.range[:, :1], window.range[:, 1:]
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
    return Window(
        tokens=jnp.pad(window.tokens, ((0, 0), (0, length)), constant_values=cfg.mask_token_id),
        positions=jnp.concatenate([window.positions, own], axis=1),
        mix=jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length), (0, 0))[: x.ndim]), window.mix),
        mask=pack_mask(jnp.concatenate([real & other, sees_shadow], axis=-1)),
    )


def predictions(hidden: jax.Array, cfg: ModelConfig, canvas: Canvas, window_len: int) -> jax.Array:
    """Of hidden states of the whole canvas, those that predict the window; and the shadow's."""
    window = gather(hidden, canvas.window_start - int(cfg.shifted_logits), window_len)
    return jnp.concatenate([window, hidden[:, canvas.tokens.shape[1] :]], axis=1)


def gather(x: jax.Array, start: jax.Array, length: int) -> jax.Array:
    """[B, length, ...]: x[b, start[b] : start[b] + length]; past the end, the last entry."""
    index = jnp.minimum(start[:, None] + jnp.arange(length)[None], x.shape[1] - 1)
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)
