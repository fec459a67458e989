"""Cache a token one step after it is decided; recompute everything undecided (dKV-Cache).

A token's keys and values change most in the step that decides it: before, MASK stood there. So they
are cached only by the forward after that one, which sees the token. Undecided positions, in the
block and behind it, are recomputed by every forward.

    tokens      pad | prompt .. | decided before | decided last | undecided .......
                      cached      cached           recomputed     recomputed
                                                   and kept

Which positions are recomputed is different in every row and round, and they are scattered. Keys
carry their rotary position, so the order of the cache's slots is free: a row's cached positions
fill slots 0 .. n - 1 in the order in which they got there. A forward runs over the positions that
are not cached, those to be kept first, and writes all its keys and values from slot n on; the row's
n then grows by the number to be kept, and what lies behind is overwritten next time.

Reference: Ma et al., "dKV-Cache: The Cache for Diffusion Language Models", arXiv:2505.15781
(dKV-Cache-Decode).

Letters: B rows, S canvas positions, G completion positions, T positions recomputed, W window
positions judged, D model width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.loop import in_place
from decode.diffusion.caches.canvas import CachePolicy, Canvas, gather
from decode.diffusion.contracts import Points, check_range
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.models.decoder import forward
from dlm.params import Params
from dlm.window import Slots, Window

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


@struct.dataclass
class DelayedCacheState:
    """What is cached, and when it was.

    Attributes:
      kv: keys and values, in slots 0 .. `num_cached` - 1 of each row; the rest is scratch. Twice as
        many slots as canvas positions, since a forward writes all its T from `num_cached` on.
      num_cached: [B] int32.
      cached: [B, S] int32. The token with which a position was cached; -1: it is not.
      age: [B] int32. Forwards since the row's last full one, itself included.
      hidden: [B, S, D]. Hidden state of every position when it was last recomputed.
    """

    kv: KVCache
    num_cached: jax.Array
    cached: jax.Array
    age: jax.Array
    hidden: jax.Array


@struct.dataclass
class DelayedCache(CachePolicy):
    """Approximate: decided tokens are cached one step late; all undecided positions are recomputed.

    Everything is recomputed when a block opens and in every `refresh_every`-th round of it (with
    one block as long as the completion: of the row). Exact with `refresh_every=1`.

    Lengths are static, so T is the shortest of a few compiled lengths that holds what the batch's
    longest row needs: S for a full forward; else G, G/2, G/4, ... The lengths change no row's
    results. A row's full forward makes that round as long for the whole batch, but nobody waits.

    Positions that hold a cached token are not recomputed; components see the statistics that they
    had when they last were.

    Deviations. The public LLaDA code runs the second forward of a block in full as well; here the
    prompt is cached by the first, nothing about it being new. With shifted logits a position is
    also recomputed as long as the one after it, which it predicts, is undecided (one of the three
    variants of the public Dream code, there "un_right"). A token that changes after it was cached,
    or falls behind a row's end, makes the row's next forward a full one.

    Attributes:
      refresh_every: n >= 1, in rounds.
      num_lengths: compiled lengths besides S, at least 1. Static.
    """

    short_name: ClassVar[str] = "delayed"

    covers: ClassVar[str] = "suffix"

    refresh_every: jax.Array | int = 8
    num_lengths: int = struct.field(pytree_node=False, default=4)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"delayed_cache": {"cache": cls()}}

    def validate(self, cfg: ModelConfig) -> None:
        check_range("refresh_every", self.refresh_every, 1, float("inf"))
        check_range("num_lengths", self.num_lengths, 1, float("inf"))

    def refuse(self, method: DiffusionMethod) -> str | None:
        if who := method.who_needs("shadow"):
            return (
                f"{who} asks what the model predicts where a token "
                "stands, which DelayedCache cannot hide from it once cached: use another cache"
            )
        if not method.inputs.shows_mask:
            return (
                "DelayedCache tells undecided positions by their MASK, and "
                f"{method.inputs.name} shows something else: use another cache"
            )
        return None

    def allocate(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> DelayedCacheState:
        return DelayedCacheState(
            kv=init_cache(cfg, batch_size, 2 * num_slots),
            num_cached=jnp.zeros(batch_size, jnp.int32),
            cached=jnp.full((batch_size, num_slots), -1, jnp.int32),
            age=jnp.zeros(batch_size, jnp.int32),
            hidden=jnp.zeros((batch_size, num_slots, cfg.d_model), cfg.jnp_dtype),
        )

    def judge(
        self,
        params: Params,
        cfg: ModelConfig,
        canvas: Canvas,
        window_len: int,
        state: DelayedCacheState,
    ) -> tuple[jax.Array, DelayedCacheState, jax.Array]:
        B, S = canvas.tokens.shape
        place = jnp.arange(S)[None]
        real = (place >= canvas.start[:, None]) & (place < canvas.end[:, None])
        settled = real & _settled(cfg, canvas)
        is_cached = state.cached >= 0
        has_changed = is_cached & ~(settled & (state.cached == canvas.tokens))
        refresh = canvas.block_is_new | (state.age >= self.refresh_every)
        refresh |= has_changed.any(axis=-1)
        is_cached &= ~refresh[:, None]
        num_cached = jnp.where(refresh, 0, state.num_cached)

        todo = real & ~is_cached
        keep = todo & settled
        order = jnp.argsort(jnp.where(keep, 0, jnp.where(todo, 1, 2)), axis=-1, stable=True)
        count = todo.sum(axis=-1)

        def run(length: int, held: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
            kv, hidden = held
            index = order[:, :length]  # [B, T] canvas positions
            window = Window(
                tokens=jnp.take_along_axis(canvas.tokens, index, axis=1),
                positions=index - canvas.start[:, None],
                range=jnp.stack([jnp.zeros_like(count), count], axis=-1),
                mix=jax.tree.map(lambda x: x[jnp.arange(B)[:, None], index], canvas.mix),
            )
            slots = Slots.append(kv, num_cached, canvas.is_active)
            slots = slots.replace(length=canvas.length)
            out = forward(params, cfg, window, slots)
            assert out.cache is not None
            is_there = (jnp.arange(length)[None] < count[:, None]) & canvas.is_active[:, None]
            index = jnp.where(is_there, index, S)  # out of bounds: dropped
            return out.cache, hidden.at[jnp.arange(B)[:, None], index].set(out.hidden, mode="drop")

        lengths = self._lengths(cfg, canvas)
        needed = jnp.where(canvas.is_active, count, 0).max()
        enough = jnp.sum(jnp.asarray(lengths) >= needed) - 1  # lengths fall
        held = state.kv, state.hidden
        for i, length in enumerate(lengths):
            held = in_place(enough == i, functools.partial(run, length), held)
        kv, hidden = held

        active = canvas.is_active
        new = DelayedCacheState(
            kv=kv,
            num_cached=jnp.where(active, num_cached + keep.sum(axis=-1), state.num_cached),
            cached=jnp.where(
                active[:, None],
                jnp.where(keep | is_cached, canvas.tokens, -1),
                state.cached,
            ),
            age=jnp.where(active, jnp.where(refresh, 1, state.age + 1), state.age),
            hidden=hidden,
        )
        return (
            gather(hidden, canvas.window_start - int(cfg.shifted_logits), window_len),
            new,
            active,
        )

    def _lengths(self, cfg: ModelConfig, canvas: Canvas) -> list[int]:
        """The values that T may have, falling: S, and what rounds between full forwards need."""
        S = canvas.tokens.shape[1]
        most = min(S - canvas.prompt_len + int(cfg.shifted_logits), S)
        lengths = [max(-(-most // 2**i), 1) for i in range(self.num_lengths)]
        return sorted({S, *lengths}, reverse=True)


def _settled(cfg: ModelConfig, canvas: Canvas) -> jax.Array:
    """[B, S] bool: positions that hold a token, and whose hidden state predicts nothing open."""
    place = jnp.arange(canvas.tokens.shape[1])[None]
    decided = (place < canvas.prompt_len) | (canvas.tokens != cfg.mask_token_id)
    if not cfg.shifted_logits:
        return decided
    after = jnp.pad(decided[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return decided & (after | (place + 1 >= canvas.end[:, None]))
