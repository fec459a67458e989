"""LayerSkip: every layer learns to say the next token, and not to need those behind it.

Reference: Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative
Decoding", arXiv:2404.16710, Sec. 4.1. With layers l = 0 .. L - 1, one head for all of them and
progress t in [0, 1) of the run,

    dropout      a row leaves out layer l with probability p_max D(l) S(t), where
                 D(l) = 2^(l / (L - 1)) - 1, and S(t) = 2^t - 1 in training from scratch, else 1
    early exits  loss = sum_l e(l) C(t, l) CE_l / sum_l e(l) C(t, l), where CE_l is the next-token
                 cross-entropy behind layer l, and with e_scale s
                 e(l) = s (0 + .. + l) for l < L - 1,    e(L - 1) = L - 1 + s (0 + .. + L - 2)
    curriculum   C(t, l) is 1 for the last layer and every R-th other one, beginning at an offset
                 that changes; and only for l >= (L - 1)(1 - t / ramp)

Deviation: the offset is drawn in every step, where the publication counts steps.

What comes out drafts for itself: `decode.speculative.drafters.dynamic_exit` and `layer_skip`.

Letters: B batch, T positions, L layers, n early exits that learn in a step, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.models.decoder import final_hidden
from dlm.trainable import Learned
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSkip(Objective):
    """Early-exit loss with layer dropout, for autoregressive models.

    In validation no layer is left out, and all exits count.

    Attributes:
      exit_scale: s >= 0, how much early exits count (published: 0.1 to 1).
      max_dropout: in [0, 1), of the last layer (published: 0.1 to 0.2).
      rotation: R >= 1; of R early exits one learns in a step.
      ramp: in [0, 1], share of the run after which all exits learn; 0: all do from the start.
      dropout_grows: whether dropout grows over the run (from scratch), or is there from the start.
      on_prompt: whether tokens of the prompt are learned too.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    keeps_apart = True

    exit_scale: float = 0.2
    max_dropout: float = 0.1
    rotation: int = 2
    ramp: float = 0.0
    dropout_grows: bool = False
    on_prompt: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if not self.exit_scale >= 0:
            raise ValueError(f"exit_scale={self.exit_scale} must be at least 0")
        if not 0 <= self.max_dropout < 1:
            raise ValueError(f"max_dropout={self.max_dropout} must be in [0, 1)")
        if not self.rotation >= 1:
            raise ValueError(f"rotation={self.rotation} must be at least 1")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp={self.ramp} must be in [0, 1]")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`.

        Returns:
          Scalar float32, and metrics: "loss", and of the whole model "model_loss" and "accuracy";
          "exit_loss" and "exit_accuracy", over the early exits that learned.
        """
        L, params = cfg.n_layers, learned.target
        rotating, dropping = jax.random.split(context.key)
        text = read_text(
            params,
            cfg,
            batch,
            self.on_prompt,
            self.remat,
            feature_layers=tuple(range(1, L)),
            sublayers=None if context.is_validation else self._kept(dropping, batch, L, context),
        )
        head, targets = vocab.head(params), text.tokens[:, 1:]
        is_scored = text.is_scored[:, 1:]
        weight = is_scored / jnp.maximum(is_scored.sum(), 1)
        last = vocab.score(head, text.hidden[:, :-1], targets)
        model_loss = -(weight * last.log_prob).sum()
        accuracy = (weight * (last.token == targets)).sum()
        if L == 1:
            return model_loss, {"loss": model_loss, "accuracy": accuracy}

        R = 1 if context.is_validation else min(self.rotation, L - 1)
        first = jax.random.randint(rotating, (), 0, R)
        layer = first + R * jnp.arange(-(-(L - 1) // R))  # [n]
        is_on = (layer < L - 1) & (layer >= (L - 1) * (1 - self._share(context)))
        layer = jnp.minimum(layer, L - 2)
        assert text.features is not None
        streams = text.features.reshape(*text.tokens.shape, L - 1, -1)[:, :-1, layer]
        hidden = final_hidden(params, cfg, streams)  # [B, T - 1, n, D]
        each = vocab.score(head, hidden, jnp.broadcast_to(targets[..., None], hidden.shape[:-1]))
        losses = -(weight[..., None] * each.log_prob).sum(axis=(0, 1))  # [n]
        right = (weight[..., None] * (each.token == targets[..., None])).sum(axis=(0, 1))

        of_exit = is_on * self.exit_scale * layer * (layer + 1) / 2
        of_last = L - 1 + self.exit_scale * (L - 2) * (L - 1) / 2
        total = (of_exit * losses).sum() + of_last * model_loss
        loss = total / (of_exit.sum() + of_last)
        mean = lambda x: (is_on * x).sum() / jnp.maximum(is_on.sum(), 1)  # noqa: E731
        return loss, {
            "loss": loss,
            "model_loss": model_loss,
            "accuracy": accuracy,
            "exit_loss": mean(losses),
            "exit_accuracy": mean(right),
        }

    def _share(self, context: Context) -> jax.Array:
        """[] float32: how many of the exits learn yet, counted from the last one."""
        if self.ramp == 0 or context.is_validation:
            return jnp.ones(())
        return jnp.minimum(jnp.asarray(context.progress, jnp.float32) / self.ramp, 1)

    def _kept(
        self, key: jax.Array, batch: Mapping[str, jax.Array], L: int, context: Context
    ) -> jax.Array:
        """[B, L, 2] bool: layers that are run, of every row."""
        by_depth = 2 ** (jnp.arange(L) / max(L - 1, 1)) - 1
        grown = 2 ** jnp.asarray(context.progress, jnp.float32) - 1 if self.dropout_grows else 1.0
        coins = jax.random.uniform(key, (len(batch["completion"]), L, 1))
        kept = coins >= self.max_dropout * (by_depth * grown)[None, :, None]
        return jnp.broadcast_to(kept, (*kept.shape[:2], 2))
