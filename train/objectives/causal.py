"""Next-token cross-entropy, for autoregressive models and for turning them into other things.

Letters: B batch, P prompt length, G completion length, T = P + G.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params
from train.losses import mean_cross_entropy
from train.objectives import Context, Predictions, TokenObjective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(TokenObjective):
    """Mean of -log p_theta(x_i | x_<i) over the tokens that count, under causal attention.

    The output at position i - 1 always predicts token i here, whatever `cfg.shifted_logits` says
    about the same weights used for diffusion. A completion counts up to its first EOS.

    Attributes:
      on_prompt: whether prompt tokens count too, all but the first one.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    keeps_apart: ClassVar[bool] = True

    on_prompt: bool = False
    remat: bool = False

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states of the tokens before those that count."""
        text = read_text(params, cfg, batch, self.on_prompt, self.remat)
        P = batch["prompt"].shape[1]
        first = P if P and not self.on_prompt else 1  # the first token that may be predicted
        is_scored = text.is_scored[:, first:]
        weight = is_scored / jnp.maximum(is_scored.sum(), 1)
        return Predictions(text.hidden[:, first - 1 : -1], text.tokens[:, first:], weight)

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and metrics: "loss" and "accuracy" (tokens whose arg-max is right)."""
        stats = vocab.score(vocab.head(params), said.hidden, said.targets)
        return mean_cross_entropy(stats.log_prob, stats.token == said.targets, said.weight > 0)
