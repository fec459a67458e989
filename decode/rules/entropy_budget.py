"""Commit as many tokens as a budget of entropy pays for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.rules.contracts import CommitRule, Round, check_range
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
    """

    budget: jax.Array | float = 0.1

    def validate(self, cfg: ModelConfig) -> None:
        check_range("budget", self.budget, 0, float("inf"), " nats")

    def commit(self, view: Round, state: Any) -> tuple[jax.Array, Any]:
        entropy = jnp.where(view.eligible, view.stats.entropy, jnp.inf)
        order = jnp.argsort(entropy, axis=-1, stable=True)
        place = jnp.argsort(order, axis=-1)
        ascending = jnp.take_along_axis(entropy, order, axis=-1)
        spent = jnp.cumsum(jnp.where(ascending < jnp.inf, ascending, 0.0), axis=-1) - ascending
        pays = (spent <= self.budget) | (jnp.arange(entropy.shape[-1])[None] == 0)
        return view.eligible & jnp.take_along_axis(pays, place, axis=-1), state
