"""Explore until it is clear how far the model can see, then decode that stretch fast."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Points, Scheduler, check_range
from decode.diffusion.round import Round, log_confidence
from dlm.config import ModelConfig


@struct.dataclass
class SlowFast(Scheduler):
    """Alternates a slow phase over the rest of a block with a fast one over a stretch of it.

    In the slow phase, each of `explore` rounds notes how far the model can see: the furthest
    position with confidence >= `floor`. Once the last two notes agree (standard deviation below
    `max_std`) that is the stretch; if they never do, their mean is. Then only the stretch is
    eligible until it is full, and the next slow phase begins behind it. Pair it with
    `Threshold(0.9)`, which is what both phases commit by.

    Reference: Wei et al., "Accelerating Diffusion Large Language Models with SlowFast Sampling: The
    Three Golden Principles", arXiv:2506.10848, Alg. 1, with the constants of the public code. That
    code goes on exploring a block which exploration has filled; here it ends.

    Attributes:
      block_len: >= 1; stretches do not cross blocks of this many positions; None: the whole
        completion. Static.
      explore: >= 2, rounds of a slow phase (6).
      floor: in [0, 1], confidence of a position that the model sees (0.3).
      max_std: >= 0, in positions, strict (1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    block_len: int | None = struct.field(pytree_node=False, default=None)
    explore: jax.Array | int = 6
    floor: jax.Array | float = 0.3
    max_std: jax.Array | float = 1.0

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"slow_fast": {"scheduler": cls()}}

    def validate(self, cfg: ModelConfig) -> None:
        if self.block_len is not None:
            check_range("block_len", self.block_len, 1, float("inf"))
        check_range("explore", self.explore, 2, float("inf"), " rounds")
        check_range("floor", self.floor, 0, 1)
        check_range("max_std", self.max_std, 0, float("inf"), " positions")

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, 3] int32: the last two notes, latest first, and the stretch's end; -1: none yet."""
        return jnp.full((batch_size, 3), -1, jnp.int32)

    def window_len(self, gen_len: int) -> int:
        return gen_len if self.block_len is None else min(self.block_len, gen_len)

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        if self.block_len is None:
            return end
        return jnp.minimum((start // self.block_len + 1) * self.block_len, end)

    def focus(self, round: Round, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        is_first = (round.block_step == 0)[:, None]
        latest, before, stretch = jnp.split(jnp.where(is_first, -1, state), 3, axis=-1)
        exploring = (round.block_step < self.explore)[:, None]
        undetermined = exploring & (stretch < 0)

        is_sure = round.eligible & (round.confidence >= log_confidence(self.floor))
        furthest = jnp.where(is_sure, round.index + 1, round.block_start[:, None] + 1)
        note = furthest.max(axis=-1, keepdims=True)
        before = jnp.where(undetermined, latest, before)
        latest = jnp.where(undetermined, note, latest)
        agree = jnp.abs(latest - before) / 2 < self.max_std  # the deviation of two numbers
        settled = undetermined & (before >= 0) & agree
        is_last = (round.block_step + 1 >= self.explore)[:, None]
        stretch = jnp.where(settled, latest, stretch)
        stretch = jnp.where(undetermined & is_last & ~settled, (latest + before) // 2, stretch)

        # The round that ends the slow phase still commits anywhere.
        end = jnp.where(is_last & exploring, stretch, round.block_end[:, None])[:, 0]
        return round.eligible, end, jnp.concatenate([latest, before, stretch], axis=-1)
