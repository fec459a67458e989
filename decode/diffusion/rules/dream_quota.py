"""Dream's timestep schedule: how many positions a step of the reverse process decides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.streams import Stream
from decode.diffusion.contracts import CommitRule, check_range
from decode.diffusion.round import Round, rank
from decode.diffusion.rules.reverse_process import decided_share
from dlm.config import ModelConfig
from kernels_pallas.unembed_stats import gumbel_noise


@struct.dataclass
class DreamQuota(CommitRule):
    """Commits floor(n (1 - t_{i+1} / t_i)) of n masks at step i, and all that is left at the end.

    Times run linearly from 1 to eps in `steps` steps. Because of eps the count is rounded down to
    one less than the even share at first (for as many steps as tokens: 0, 1, 1, ..., 1, 2); the
    published sampler spends a forward on that empty first step. By default at least one position
    is committed, and the last steps fall away; `may_idle=True` is bit-faithful to the public code.

    Committed are the surest positions, or with `alg_temp` positions drawn without replacement with
    probabilities softmax(c / alg_temp). Published confidences c are probabilities, their margins,
    or minus entropies in nats. `Round.confidence` is the log of the former, but the latter as they
    are, so `alg_temp_units` must say which of both c is: with "probability" c is exp(confidence),
    with "nats" the confidence itself.

    The count is per row; the published batched code uses the mean over the batch, which makes rows
    depend on each other.

    Reference: Ye et al., "Dream 7B", arXiv:2508.15487, and `diffusion_generate` of the public code
    (alg = maskgit_plus, topk_margin or entropy; pair with that confidence, and with one block; with
    a temperature or filters also with `Tempered` and `Nucleus`).

    Attributes:
      steps: number of steps per block, >= 1.
      eps: the last time, in (0, 1).
      alg_temp: >= 0. None or 0: the surest positions.
      alg_temp_units: "probability" for `Probability` and `Margin`, "nats" for `NegEntropy`. Of
        probabilities, "nats" draws with p^(1 / alg_temp). Static.
      may_idle: whether steps may commit nothing, as in the public code.
    """

    steps: jax.Array | int = 256
    eps: jax.Array | float = 1e-3
    alg_temp: jax.Array | float | None = None
    alg_temp_units: str = struct.field(pytree_node=False, default="probability")
    may_idle: bool = struct.field(pytree_node=False, default=False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        needs = {"idle"} if self.may_idle else set()
        return frozenset(needs | ({"values"} if self.alg_temp is not None else set()))

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps", self.steps, 1, float("inf"))
        check_range("eps", self.eps, 0, 1, ends="()")
        if self.alg_temp is not None:
            check_range("alg_temp", self.alg_temp, 0, float("inf"), ", or None")
        if self.alg_temp_units not in ("probability", "nats"):
            raise ValueError(
                f"alg_temp_units={self.alg_temp_units!r} must be 'probability' or 'nats'"
            )

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        masks = round.eligible.sum(axis=-1)
        share = decided_share(round.block_step, self.steps, self.eps)
        quota = jnp.floor(masks.astype(jnp.float32) * share).astype(jnp.int32)
        if not self.may_idle:  # here rather than by the loop, which would not draw it
            quota = jnp.minimum(jnp.maximum(quota, 1), masks)
        return rank(self._score(round), round.eligible) < quota[:, None], state

    def _score(self, round: Round) -> jax.Array:
        """[B, W] float32, of which the largest are committed (Gumbel top-k)."""
        if self.alg_temp is None:
            return round.confidence
        c = round.confidence
        if self.alg_temp_units == "probability":
            c = jnp.expm1(c)  # p - 1 draws as p does, and tells apart what is almost certain
        B, W = c.shape
        stream = jnp.array([Stream.DREAM_QUOTA], jnp.uint32)
        noise = gumbel_noise(round.noise_key.reshape(B * W, 2), stream)
        alg_temp = jnp.asarray(self.alg_temp, jnp.float32)
        noisy = c + alg_temp * noise.reshape(B, W)
        return jnp.where(alg_temp > 0, noisy, round.confidence)
