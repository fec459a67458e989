"""Dream's timestep schedule: how many positions a step of the reverse process decides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.rules.contracts import CommitRule, Round, check_range, rank
from dlm.config import ModelConfig


@struct.dataclass
class DreamQuota(CommitRule):
    """Commits floor(n (1 - t_{i+1} / t_i)) of n masks at step i, and all that is left at the end.

    Times run linearly from 1 to eps in `steps` steps. Because of eps the count is rounded down to
    one less than the even share at first (for as many steps as tokens: 0, 1, 1, ..., 1, 2); the
    published sampler spends a forward on that empty first step. By default at least one position
    is committed, and the last steps fall away; `may_idle=True` is bit-faithful to the public code.

    The count is per row; the published batched code uses the mean over the batch, which makes rows
    depend on each other.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487, and `diffusion_generate` of the public code
    (alg = maskgit_plus, topk_margin or entropy; pair with that confidence, and with one block).

    Attributes:
      steps: number of steps per block, >= 1.
      eps: the last time, in (0, 1).
      may_idle: whether steps may commit nothing, as in the public code.
    """

    steps: jax.Array | int = 256
    eps: jax.Array | float = 1e-3
    may_idle: bool = struct.field(pytree_node=False, default=False)

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps", self.steps, 1, float("inf"))
        check_range("eps", self.eps, 1e-12, 1)

    def commit(self, view: Round, state: Any) -> tuple[jax.Array, Any]:
        masks = view.eligible.sum(axis=-1)
        steps = jnp.asarray(self.steps, jnp.int32)
        keep = self._time(view.block_step + 1) / self._time(view.block_step)
        quota = jnp.floor(masks.astype(jnp.float32) * (1 - keep)).astype(jnp.int32)
        quota = jnp.where(view.block_step >= steps - 1, masks, quota)
        return rank(view.confidence, view.eligible) < quota[:, None], state

    def _time(self, i: jax.Array) -> jax.Array:
        """linspace(1, eps, steps + 1)[i] in float32, filled from both ends like the original."""
        steps = jnp.asarray(self.steps, jnp.float32)
        eps = jnp.asarray(self.eps, jnp.float32)
        delta = (eps - 1) / steps
        i32 = i.astype(jnp.float32)
        return jnp.where(i32 < (steps + 1) / 2, 1 + delta * i32, eps - delta * (steps - i32))
