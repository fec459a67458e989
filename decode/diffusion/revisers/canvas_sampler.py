"""Sampling a canvas of noise: everything is judged again in every round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Confidence, Reviser, check_range
from decode.diffusion.round import Revision, Round, within_budget
from dlm.config import ModelConfig
from kernels_pallas.unembed_stats import Noise, logits_stats

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


@struct.dataclass
class Annealed(Confidence):
    """Proposes samples at a temperature that falls over the rounds of a block.

    The temperature goes linearly from `first` to `last` in `steps` rounds. Confidence is the
    sample's probability, without temperature.

    Reference: the sampler of DiffusionGemma (Google, 2026).

    Attributes:
      first: > 0 (0.8).
      last: > 0 (0.4).
      steps: >= 2, rounds (48).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    first: jax.Array | float = 0.8
    last: jax.Array | float = 0.4
    steps: jax.Array | int = 48

    def validate(self, cfg: ModelConfig) -> None:
        check_range("first", self.first, 0, float("inf"), ends="(]")
        check_range("last", self.last, 0, float("inf"), ends="(]")
        check_range("steps", self.steps, 2, float("inf"), " rounds")

    def refuse(self, method: DiffusionMethod) -> str | None:
        if method.temperature is not None:
            return "Annealed sets the temperature itself: leave temperature out"
        return None

    def measure(self, round: Round, state: Any) -> tuple[Round, Any]:
        assert round.logits is not None
        B, W, V = round.logits.shape
        done = jnp.clip(round.block_step / (jnp.asarray(self.steps) - 1), 0.0, 1.0)
        temperature = self.first + (self.last - self.first) * done.astype(jnp.float32)
        # softmax(z / T) at temperature 1 is softmax(z) at temperature T, per row.
        cooled = (round.logits / temperature[:, None, None]).reshape(B * W, V)
        noise = Noise(round.noise_key.reshape(B * W, 2), jnp.float32(1.0))
        token = logits_stats(cooled, noise=noise).sample
        assert token is not None
        token = token.reshape(B, W)
        logit = jnp.take_along_axis(round.logits, token[..., None], axis=-1)[..., 0]
        log_prob = logit - round.stats.logsumexp
        return round.replace(proposal=token, log_prob=log_prob, confidence=log_prob), state


@struct.dataclass
class Renoise(Reviser):
    """Keeps the proposals an entropy budget admits, and makes all others of the block noise again.

    In every round, all positions of the block are sorted by entropy; the least uncertain are kept
    as long as the entropy *before* a position adds up to at most `budget`. Kept ones hold their
    present proposal, the others become undecided, whatever they were. The block ends with its
    arg-maxes once its mean entropy is below `max_mean_entropy` and they are those of the round
    before, or after `steps` rounds. The rule has no say.

    Reference: the sampler of DiffusionGemma (Google, 2026): one canvas of 256 positions, 48 steps,
    budget 0.1, with `UniformNoise` and `Annealed`.

    Attributes:
      budget: >= 0, in nats (0.1).
      max_mean_entropy: >= 0, in nats, strict (0.005).
      steps: >= 1, the most rounds per block (48).
    """

    budget: jax.Array | float = 0.1
    max_mean_entropy: jax.Array | float = 0.005
    steps: jax.Array | int = 48

    def validate(self, cfg: ModelConfig) -> None:
        check_range("budget", self.budget, 0, float("inf"), " nats")
        check_range("max_mean_entropy", self.max_mean_entropy, 0, float("inf"), " nats")
        check_range("steps", self.steps, 1, float("inf"), " rounds")

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, W] int32: arg-maxes of the round before; -1: none yet."""
        return jnp.full((batch_size, window_len), -1, jnp.int32)

    def revise(
        self, round: Round, commit: jax.Array, state: jax.Array
    ) -> tuple[Revision, jax.Array]:
        block, best = round.in_block, round.stats.token
        admitted = within_budget(round.stats.entropy, block, self.budget)
        total = jnp.where(block, round.stats.entropy, 0.0).sum(axis=-1)
        mean = total / jnp.maximum(block.sum(axis=-1), 1)
        unchanged = ((best == state) | ~block).all(axis=-1) & (round.block_step > 0)
        settled = unchanged & (mean < self.max_mean_entropy)
        is_last = settled | (round.block_step + 1 >= self.steps)
        revision = Revision(
            commit=jnp.where(is_last[:, None], block, admitted),
            take_back=block & ~admitted & ~is_last[:, None],
            hold=~is_last,
            proposal=jnp.where(is_last[:, None], best, round.proposal),
        )
        return revision, best
