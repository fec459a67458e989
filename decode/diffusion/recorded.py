"""What a decoding saw, round by round: for training, not for use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.diffusion.contracts import Confidence, Reviser
from decode.diffusion.round import Revision, Round
from dlm.config import ModelConfig

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


class Record(struct.PyTreeNode):
    """Rounds of a batch; those that did not happen hold zeros and MASK nothing.

    Attributes:
      confidence: [B, R, W] float32 in [0, 1]. Of every position's proposal.
      proposal: [B, R, W] int32.
      undecided: [B, R, W] bool. Before the round's commits; False outside of the open block.
      block_start: [B, R] int32. First completion position of the open block.
    """

    confidence: jax.Array
    proposal: jax.Array
    undecided: jax.Array
    block_start: jax.Array


@struct.dataclass
class Recorded(Confidence):
    """Another measure, with a record of the first rounds as its state.

    The window must be the open block, position by position.

    Attributes:
      num_rounds: R >= 1; later rounds are not recorded. Static.
      base: the measure, one without a memory of its own; None: the proposal's probability.
    """

    num_rounds: int = struct.field(pytree_node=False)
    base: Confidence | None = None

    def validate(self, cfg: ModelConfig) -> None:
        if self.base is None:
            return
        self.base.validate(cfg)
        if self.base.needs or jax.tree.leaves(self.base.init(cfg, 1, 1)):
            raise ValueError(
                f"Recorded(base={self.base.name}) must be of a measure without logits or "
                "memory of its own"
            )

    def refuse(self, method: DiffusionMethod) -> str | None:
        if method.width != "block":
            return "Recorded needs windows of one block, and another component wants to see more"
        return None

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> Record:
        shape = (batch_size, self.num_rounds, window_len)
        return Record(
            confidence=jnp.zeros(shape, jnp.float32),
            proposal=jnp.zeros(shape, jnp.int32),
            undecided=jnp.zeros(shape, bool),
            block_start=jnp.zeros(shape[:2], jnp.int32),
        )

    def measure(self, round: Round, state: Record) -> tuple[Round, Record]:
        if self.base is None:
            round = round.replace(confidence=round.log_prob)
        else:
            round, _ = self.base.measure(round, ())
        rows, at = jnp.arange(round.row_step.shape[0]), round.row_step

        def note(where: jax.Array, what: jax.Array) -> jax.Array:
            return where.at[rows, at].set(what, mode="drop")

        return round, Record(
            confidence=note(
                state.confidence, jnp.where(round.in_block, jnp.exp(round.confidence), 0.0)
            ),
            proposal=note(state.proposal, round.proposal),
            undecided=note(state.undecided, round.undecided & round.in_block),
            block_start=note(state.block_start, round.block_start),
        )


class OracleState(struct.PyTreeNode):
    """State of `GreedyOracle`.

    Attributes:
      before: [B, W] int32. The block's proposals in the round before; -1: it is the first.
      answer: [B] int32. Which answer is the row's; at first row b has answer b.
    """

    before: jax.Array
    answer: jax.Array


@struct.dataclass
class GreedyOracle(Reviser):
    """Extremely greedy parallel decoding (EGP): commits whatever a reference answer confirms.

    Every undecided position of the open block whose proposal is the reference's token is committed,
    whatever the commit rule says. If no proposal of the block has changed since the round before,
    the rest of the block is filled with the reference.

    Reference: Bao et al., "Learning to Parallel", arXiv:2509.25188, Sec. 3.1 and the public code:
    how training data of the filter is made, with the model's own answer as the reference.

    Attributes:
      reference: [N, G] int32. The answers, see `OracleState.answer`.
    """

    reference: jax.Array | np.ndarray

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> OracleState:
        return OracleState(
            before=jnp.full((batch_size, window_len), -1, jnp.int32),
            answer=jnp.arange(batch_size),
        )

    def revise(self, round: Round, commit: jax.Array, state: OracleState) -> tuple[Revision, Any]:
        place = jnp.minimum(round.index, self.reference.shape[1] - 1)
        right = jnp.asarray(self.reference)[state.answer[:, None], place]
        before = jnp.where((round.block_step == 0)[:, None], -1, state.before)
        is_stuck = ((round.proposal == before) | ~round.in_block).all(axis=-1, keepdims=True)
        wanted = round.undecided & round.in_block
        return Revision(
            commit=wanted & (is_stuck | (round.proposal == right)),
            proposal=jnp.where(is_stuck, right, round.proposal),
        ), state.replace(before=round.proposal)
