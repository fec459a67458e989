"""Commit as many tokens as a budget of entropy pays for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, check_range
from decode.diffusion.round import Round, rank, within_budget
from dlm.config import ModelConfig


@struct.dataclass
class EntropyBudget(CommitRule):
    """Commits the n lowest entropies for the largest n whose sum without the last is within budget.

    The sum of all but the largest entropy bounds the mutual information that committing n tokens at
    once ignores. One position always passes. Looks at entropies whatever the confidence is.

    Reference: Ben-Hamu et al., "Accelerated Sampling from Masked Diffusion Models via Entropy
    Bounded Unmasking" (EB-Sampler), arXiv:2505.24857, Eq. 8.

    Attributes:
      budget: gamma >= 0, in nats; 0.001 to 0.15 there.
      counts_last: whether the sum is that of all n and must stay below the budget, as JetEngine has
        it (Cheng et al., "SDAR", arXiv:2510.06303, `entropy_bounded`). Static.
    """

    budget: jax.Array | float = 0.1
    counts_last: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "entropy_budget_0.01": {"rule": cls(0.01)},
            "entropy_budget": {"rule": cls(0.1)},
            "entropy_budget_0.5": {"rule": cls(0.5)},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("budget", self.budget, 0, float("inf"), " nats")

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        entropy = round.stats.entropy
        if not self.counts_last:
            return within_budget(entropy, round.eligible, self.budget), state
        order = rank(-entropy, round.eligible)  # [B, W]
        up_to = (order[:, :, None] >= order[:, None]) & round.eligible[:, None]
        total = jnp.where(up_to, entropy[:, None], 0.0).sum(axis=-1)
        return round.eligible & ((total < self.budget) | (order == 0)), state
