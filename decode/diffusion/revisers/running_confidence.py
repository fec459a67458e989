"""Nothing is final: in every round the surest tokens so far stay, whenever they were proposed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Reviser
from decode.diffusion.round import Revision, Round, rank
from dlm.config import ModelConfig


@struct.dataclass
class RunningConfidence(Reviser):
    """The rule says how many more tokens stand after a round; the surest so far are those.

    All eligible positions get their proposals and confidences, which compete with the confidences
    that decided tokens had when they were committed. If n tokens of the block stood before the
    round and the rule would commit k, the n + k surest stay, and the others are undecided again.
    Ties go to the left.

    The number of tokens grows as fast as with the rule alone, so a block has no more forwards than
    undecided positions (rules that never idle), and with `Quota(steps)` as many as without.

    Reference: He et al., "MDPO: Overcoming the Training-Inference Divide of Masked Diffusion
    Language Models" (Running Confidence Remasking), arXiv:2508.13148. In the public code numbers
    are those of a linear schedule, n - floor(n (1 - (i + 1) / steps)) tokens after step i: those
    of `Quota` if n is a multiple of the steps, else the larger commits come at other steps.
    """

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W] float32: confidences at commit, on the log scale; inf: not of this block."""
        return jnp.full((batch_size, window_len), jnp.inf, jnp.float32)

    def revise(
        self, round: Round, commit: jax.Array, state: jax.Array
    ) -> tuple[Revision, jax.Array]:
        recorded = jnp.where((round.block_step == 0)[:, None], jnp.inf, state)
        running = jnp.where(round.eligible, round.confidence, recorded)
        decided = round.in_block & ~round.undecided
        num_stay = decided.sum(axis=-1) + commit.sum(axis=-1)
        stays = rank(running, decided | round.eligible) < num_stay[:, None]
        return Revision(round.eligible & stays, decided & ~stays), running
