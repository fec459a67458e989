"""Some rounds more near the end of a block, to decide its least sure tokens again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Reviser, check_range
from decode.diffusion.round import Revision, Round, rank
from dlm.config import ModelConfig


class RemaskState(struct.PyTreeNode):
    """What the reviser remembers of a block.

    Attributes:
      recorded: [B, W] float32. Confidences at commit, on the log scale; inf: not of this block.
      made: [B] int32. Extra rounds asked for.
      taken: [B] int32. Tokens taken back for the next round, an extra one; 0: it is the rule's.
    """

    recorded: jax.Array
    made: jax.Array
    taken: jax.Array


@struct.dataclass
class Remask(Reviser):
    """Inserts `rounds` extra rounds into a block once a share `after` of it is decided.

    Each extra round finds the `count` tokens with the lowest confidence at commit undecided again
    (the leftmost on ties; all tokens of the block if there are fewer), and commits as many of the
    surest eligible positions, instead of what the rule says. The first takes from what stands after
    the round that reached the share, its commits included.

    Extra rounds give back what they take, so a block has at most `rounds` forwards more than
    undecided positions (rules that never idle; a scheduler that offers part of a block at a time:
    `rounds * (1 + count)` more). Rules that count a block's rounds count the extra ones too. For
    `Quota` that matters if the block is no multiple of its steps: positions that the division
    leaves over may then need another round.

    Reference: the ReMDM-like baseline of Kang et al., "ParallelBench", arXiv:2510.04767, after
    `llada_remdm_sample` of the public code. There the extra steps come after int(7/8 of the block's
    positions) steps. With one token per step that is `after=7/8` here; a schedule with fewer steps
    than that has them at the very end, `after=1`. Here decided positions are counted, not steps, so
    that any rule will do.

    Attributes:
      rounds: r >= 0, extra rounds per block. 0: none.
      count: q >= 1, tokens taken back for each.
      after: in [0, 1], share of the positions that were open, rounded down, but at least one.
    """

    rounds: jax.Array | int = 4
    count: jax.Array | int = 1
    after: jax.Array | float = 7 / 8

    def validate(self, cfg: ModelConfig) -> None:
        check_range("rounds", self.rounds, 0, float("inf"))
        check_range("count", self.count, 1, float("inf"))
        check_range("after", self.after, 0, 1)

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> RemaskState:
        return RemaskState(
            jnp.full((batch_size, window_len), jnp.inf, jnp.float32),
            jnp.zeros(batch_size, jnp.int32),
            jnp.zeros(batch_size, jnp.int32),
        )

    def revise(
        self, round: Round, commit: jax.Array, state: RemaskState
    ) -> tuple[Revision, RemaskState]:
        is_new = round.block_step == 0
        made = jnp.where(is_new, 0, state.made)
        taken = jnp.where(is_new, 0, state.taken)[:, None]
        again = round.eligible & (rank(round.confidence, round.eligible) < taken)
        commit = jnp.where(taken > 0, again, commit)
        recorded = jnp.where(is_new[:, None], jnp.inf, state.recorded)
        recorded = jnp.where(commit, round.confidence, recorded)

        share = jnp.floor(self.after * round.num_open.astype(jnp.float32)).astype(jnp.int32)
        left = (round.in_block & round.undecided & ~commit).sum(axis=-1)
        is_due = (made > 0) | (left <= round.num_open - jnp.maximum(share, 1))
        is_due &= made < self.rounds

        own = round.in_block & (~round.undecided | commit) & (recorded < jnp.inf)
        take_back = own & (rank(-recorded, own) < self.count) & is_due[:, None]
        made, taken = made + is_due, take_back.sum(axis=-1, dtype=jnp.int32)
        return Revision(commit, take_back), RemaskState(recorded, made, taken)
