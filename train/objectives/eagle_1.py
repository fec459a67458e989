"""EAGLE-1's network learns to continue the target's hidden states.

Reference: Li et al., arXiv:2401.15077, Sec. 4.2, and the public code; the network is
`dlm.heads.eagle_1`. With f_t the target's final hidden state at t, s_t the network's at the pair
(f_t, x_{t+1}), and p and q the distributions of x_{t+2} that the target's head makes of f_{t+1} and
s_t:

    loss = mean over t of  SmoothL1(s_t, f_{t+1}) / D  +  weight * -sum_x p(x) log q(x)

over tokens x_{t+2} of completions up to their first EOS. What is read is f_t + uniform noise of
+-0.1 * 512 / T, against the errors that its own states will have.

Letters: B batch, T positions, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.eagle import EagleNetwork
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.trainable import Learned
from dlm.window import Window
from train.losses import score_head, soft_cross_entropy
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle1Loss(Objective):
    """Goes with `dlm.heads.eagle_1:Eagle1Heads` as `train.trainable`.

    Attributes:
      weight: of the cross-entropy, >= 0 (published: 0.1).
      noise: half the width of the noise at 512 positions, >= 0 (published: 0.1).
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = Eagle1Heads

    weight: float = 0.1
    noise: float = 0.1
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and self.noise >= 0):
            raise ValueError(f"weight={self.weight} and noise={self.noise} must be at least 0")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` is a network.

        Returns:
          Scalar float32, and metrics: "loss", "feature_loss", "soft_cross_entropy" and "accuracy_2"
          (second tokens after a position that are q's arg-max).
        """
        network: EagleNetwork = learned.own
        target = learned.target
        text = jax.lax.stop_gradient(read_text(target, cfg, batch, self.on_prompt))
        T = text.tokens.shape[1]
        bound = self.noise * 512 / T
        noise = jax.random.uniform(context.key, text.hidden.shape, minval=-bound, maxval=bound)
        following = jnp.pad(text.tokens[:, 1:], ((0, 0), (0, 1)))
        states, _ = network.read(
            target,
            (text.hidden + noise).astype(text.hidden.dtype),
            Window.left_padded(following, text.start, is_causal=True),
        )
        ours, theirs = states[:, :-2], text.hidden[:, 1:-1]
        gap = jnp.abs(ours.astype(jnp.float32) - theirs)
        of_features = jnp.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean(axis=-1)
        teacher = vocab.head(target)
        of_probs = soft_cross_entropy(teacher, ours, teacher, theirs)
        scored = text.is_scored[:, 2:] & (jnp.arange(T - 2)[None] >= text.start[:, None])
        num = jnp.maximum(scored.sum(), 1)
        feature_loss, cross_entropy = (
            jnp.where(scored, x, 0.0).sum() / num for x in (of_features, of_probs)
        )
        score = score_head(jax.lax.stop_gradient(states), teacher, text, ahead=2)
        loss = feature_loss + self.weight * cross_entropy
        return loss, {
            "loss": loss,
            "feature_loss": feature_loss,
            "soft_cross_entropy": cross_entropy,
            "accuracy_2": (score.is_right & scored).sum() / num,
        }
