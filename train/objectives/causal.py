"""Next-token cross-entropy, for autoregressive models and for turning them into other things.

Letters: B batch, P prompt length, G completion length, T = P + G.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from dlm import vocab
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Window
from train.objectives import Context, Predictions, TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Causal(TokenObjective):
    """Mean of -log p_theta(x_i | x_<i) over the tokens that count, under causal attention.

    The output at position i - 1 always predicts token i here, whatever `cfg.shifted_logits` says
    about the same weights used for diffusion. A completion counts up to its first EOS.

    Attributes:
      on_prompt: whether prompt tokens count too, all but the first one.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    on_prompt: bool = False
    remat: bool = False

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states of the tokens before those that count."""
        text = read_text(params, cfg, batch, self.on_prompt, self.remat)
        P = batch["prompt"].shape[1]
        first = P if P and not self.on_prompt else 1  # the first token that may be predicted
        counts = text.counts[:, first:]
        weight = counts / jnp.maximum(counts.sum(), 1)
        return Predictions(text.hidden[:, first - 1 : -1], text.tokens[:, first:], weight)

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and metrics: "loss" and "accuracy" (tokens whose arg-max is right)."""
        stats = vocab.score(vocab.head(params), said.hidden, said.targets)
        return mean_cross_entropy(stats.log_prob, stats.token == said.targets, said.weight > 0)


class Text(struct.PyTreeNode):
    """Prompts and completions as an autoregressive model reads them.

    Attributes:
      tokens: [B, T] int32.
      hidden: [B, T, D]. Final hidden states; that of position t predicts token t + 1.
      counts: [B, T] bool. Tokens that are to be predicted.
      start: [B] int32. The first real position.
      features: [B, T, n D], or None; see `dlm.models.decoder.forward`.
    """

    tokens: jax.Array
    hidden: jax.Array
    counts: jax.Array
    start: jax.Array
    features: jax.Array | None = None

    @property
    def positions(self) -> jax.Array:
        """[B, T] int32. Rotary positions; before the first real one, 0."""
        index = jnp.arange(self.tokens.shape[1])[None]
        return jnp.maximum(index - self.start[:, None], 0)


def read_text(
    params: Params,
    cfg: ModelConfig,
    batch: Mapping[str, jax.Array],
    on_prompt: bool,
    remat: bool = False,
    feature_layers: tuple[int, ...] = (),
) -> Text:
    """The forward pass of `Causal`: one batch, and which tokens of it count."""
    prompt, start = batch["prompt"], batch["prompt_start"]
    P = prompt.shape[1]
    tokens = jnp.concatenate([prompt, batch["completion"]], axis=1)  # [B, T]
    output = decoder.forward(
        params,
        cfg,
        Window.left_padded(tokens, start, is_causal=True),
        feature_layers=feature_layers,
        remat=remat,
    )
    index = jnp.arange(tokens.shape[1])[None]
    # A row's first real token has nothing before it to be predicted from.
    counts = (index > start[:, None]) & (index < P + batch["completion_len"][:, None])
    if not on_prompt:
        counts &= index >= P
    return Text(tokens, output.hidden, counts, start, output.features)


def mean_cross_entropy(
    log_prob: jax.Array, is_right: jax.Array, counts: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy over the tokens that count.

    Args:
      log_prob: [B, n] float32. Of the right token.
      is_right: [B, n] bool. Whether it is the model's arg-max.
      counts: [B, n] bool.

    Returns:
      Scalar float32, and the metrics of `Causal.score`.
    """
    total = jnp.maximum(counts.sum(), 1)
    loss = jnp.where(counts, -log_prob, 0.0).sum() / total
    return loss, {"loss": loss, "accuracy": (is_right & counts).sum() / total}
