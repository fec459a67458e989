"""A pipeline of blocks: the next one opens before the last one is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Points, Scheduler, check_range
from decode.diffusion.round import Progress, Round, log_confidence
from dlm.config import ModelConfig

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


@struct.dataclass
class MultiBlock(Scheduler):
    """Opens a block when the one before it is partly decided; decodes all open blocks at once.

    After each round, the next block opens if a share `open_at` of the last open one is decided, as
    long as no more than `max_open` are. A block whose predecessor is decided to less than
    `active_at` is half active: there, positions are eligible only with confidence >= `gate`. The
    step's guaranteed commit is the surest eligible position of all open blocks.

    Block caches refresh whenever the first open block is done. Confidences and rules that remember
    a block start over at that moment too. Models that were trained in blocks need theirs
    (`aligned`), and the cache of these.

    Reference: Wang et al., "D2F", arXiv:2508.09192, section 3.3 (pipelined decoding; 0.1, 0.95,
    gate 0.9 there); Qian et al., "d3LLM", arXiv:2601.07568 (0.5, no gate).

    Attributes:
      block_len: >= 1, positions per block; the last one may be shorter. Static.
      max_open: >= 1, blocks decoded at once; the window is that long. Static. 1: `FixedBlocks`.
      open_at: in [0, 1], share of the last open block that opens the next. 1: when it is full.
      active_at: in [0, 1], share of the predecessor that makes a block fully active.
      gate: in [0, 1], confidence needed in half active blocks. 0: no gate.
      aligned: whether blocks are counted from the start of the prompt, as block-diffusion models
        need, so that the first one may be shorter too. Static.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    opens_early: ClassVar[bool] = True

    block_len: int = struct.field(pytree_node=False, default=32)
    max_open: int = struct.field(pytree_node=False, default=4)
    open_at: jax.Array | float = 0.5
    active_at: jax.Array | float = 1.0
    gate: jax.Array | float = 0.0
    aligned: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "multi_block": {"scheduler": cls(block_len, 4)},
            "multi_block_gated": {"scheduler": cls(block_len, 4, 0.1, active_at=0.95, gate=0.9)},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("block_len", self.block_len, 1, float("inf"))
        check_range("max_open", self.max_open, 1, float("inf"), " blocks")
        for name in ("open_at", "active_at", "gate"):
            check_range(name, getattr(self, name), 0, 1)

    def refuse(self, method: DiffusionMethod) -> str | None:
        if method.rule.counts_rounds:
            return (
                f"{method.rule.name} spreads a block over its rounds, but MultiBlock decodes "
                "several blocks at once: use a rule that goes by confidence"
            )
        if method.reviser.changes:
            return (
                f"{method.reviser.name} works on one block until it is done, but MultiBlock moves "
                "on: use a scheduler of single blocks with it"
            )
        return None

    @property
    def fixed_len(self) -> int:
        return self.block_len

    @property
    def is_aligned(self) -> bool:
        return self.aligned

    def _num_blocks(self, gen_len: int) -> int:
        """Most blocks of a completion."""
        return -(-(gen_len + (self.block_len - 1) * self.aligned) // self.block_len)

    def _behind(self, prompt_len: jax.Array) -> jax.Array:
        """[B]: so many positions before the completion its first block starts."""
        return prompt_len % self.block_len if self.aligned else jnp.zeros_like(prompt_len)

    def window_len(self, gen_len: int) -> int:
        if self.aligned:  # whole blocks, of which the first may begin in the prompt
            return min(self.max_open, self._num_blocks(gen_len)) * self.block_len
        return min(self.max_open * self.block_len, gen_len)

    def open_block(self, start: jax.Array, end: jax.Array, prompt_len: jax.Array) -> jax.Array:
        behind = (start + self._behind(prompt_len)) % self.block_len
        return jnp.minimum(start + self.block_len - behind, end)

    def focus(self, round: Round, state: Any) -> tuple[jax.Array, jax.Array, Any]:
        behind = self._behind(round.prompt_len)
        block = (round.index + behind[:, None]) // self.block_len  # [B, W]
        block -= ((round.block_start + behind) // self.block_len)[:, None]
        same = block[:, :, None] == block[:, None, :] + 1  # the predecessor's positions
        same &= round.in_block[:, None]
        share = (same & ~round.undecided[:, None]).sum(axis=-1) / jnp.maximum(same.sum(axis=-1), 1)
        is_active = (block == 0) | (share >= self.active_at)
        passes = round.confidence >= log_confidence(self.gate)
        return round.eligible & (is_active | passes), round.block_end, state

    def advance(self, progress: Progress) -> tuple[jax.Array, jax.Array]:
        C, G = self.block_len, progress.decided.shape[1]
        behind = self._behind(progress.prompt_len)[:, None]  # [B, 1]
        number = jnp.arange(self._num_blocks(G))[None]
        first, stop = jnp.maximum(number * C - behind, 0), (number + 1) * C - behind
        place = jnp.arange(G)[None]
        there = place < progress.end[:, None]
        here = (place + behind)[..., None] // C == number[:, None]  # [B, G, blocks]

        def count(where: jax.Array) -> jax.Array:
            return (here & where[..., None]).sum(axis=1)

        size, done = count(there), count(there & progress.decided)
        is_open = (first >= progress.block_start[:, None]) & (first < progress.block_end[:, None])
        complete = jnp.cumprod((done == size) | (first < progress.block_start[:, None]), axis=-1)
        passed = (complete.astype(bool) & is_open).sum(axis=-1)

        def boundary(place: jax.Array, blocks: jax.Array | int) -> jax.Array:
            """Where the block that holds a position starts, or one so many blocks behind it."""
            return ((place + behind[:, 0]) // C + blocks) * C - behind[:, 0]

        start = jnp.maximum(boundary(progress.block_start, passed), progress.block_start)
        start = jnp.minimum(start, progress.end)
        is_last = is_open & (stop >= progress.block_end[:, None])
        ripe = is_last & (done >= self.open_at * size)
        until = progress.block_end + jnp.where(ripe.any(axis=-1), C, 0)
        until = jnp.maximum(until, boundary(start, 1))
        limit = jnp.minimum(boundary(start, self.max_open), progress.end)
        return start, jnp.minimum(until, limit)
