"""The masked-diffusion objective: predict masked tokens, at every level of masking.

Reference: Nie et al., "Large Language Diffusion Models" (LLaDA), arXiv:2502.09992, Sec. 2.2
(pre-training), Sec. 2.3 (supervised fine-tuning) and Alg. 1 and 2. For a row with G completion
tokens x, EOS padding included:

    t ~ Uniform(0, 1)         one draw per row
    p = (1 - eps) t + eps
    each completion token is replaced by MASK with probability p, independently
    loss = 1/G * sum over masked tokens of  -log p_theta(x_i | prompt, masked completion) / p

averaged over rows. The prompt is never masked. Without a prompt this is the pre-training loss,
whose divisor is all tokens. The network sees neither t nor p.

An autoregressive model becomes a diffusion model with `anneal`: attention starts causal, and each
pair of a position and a later one is attended to with a probability that rises to 1 (Gong et al.,
"Scaling Diffusion Language Models via Adaptation from Autoregressive Models", arXiv:2410.17891,
Sec. 3.2). Whether outputs stay shifted, as in Dream (arXiv:2508.15487), is the model's
`shifted_logits`.

Deviations, both optional: with `weight_power` = a < 1 the weight is p^-a. At 0 every masked token
counts the same, which bounds nothing but has less variance, and stresses rows that are masked
almost entirely; small models learn much faster so. With `stratified`, the B draws of t are
(u + b / B) mod 1 with one u ~ Uniform(0, 1). Each t is still uniform, so the expected loss is the
same, and its variance over batches is lower.

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
from kernels_pallas.window_attention import pack_mask
from train.losses import weighted_loss
from train.objectives import Context, Predictions, TokenObjective
from train.reading import read_completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(TokenObjective):
    """LLaDA's training loss.

    Attributes:
      eps: the smallest masking probability, so that no weight 1/p exceeds 1/eps; in (0, 1).
      stratified: whether the rows of a batch share out the masking levels (see above).
      weight_power: a in [0, 1]; masked tokens are weighted by p^-a. 1: the published bound.
      anneal: in [0, 1], share of the steps in which attention goes from causal to full; 0: it is
        full.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    keeps_apart: ClassVar[bool] = True

    eps: float = 1e-3
    stratified: bool = True
    weight_power: float = 1.0
    anneal: float = 0.0
    remat: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps} must be in (0, 1)")
        if not 0 <= self.weight_power <= 1:
            raise ValueError(f"weight_power={self.weight_power} must be in [0, 1]")
        if not 0 <= self.anneal <= 1:
            raise ValueError(f"anneal={self.anneal} must be in [0, 1]")

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states [B, G, D] of masked completions.

        Raises:
          ValueError: the model has no mask token, or it is shifted and there is no prompt.
        """
        is_masked, p = self._corrupt(batch["completion"].shape, context.key)
        mask = self._attention(batch, context) if self.anneal else None
        hidden = read_completion(params, cfg, batch, is_masked, mask, self.remat)
        weight = is_masked / p[:, None] ** self.weight_power / is_masked.size
        return Predictions(hidden, batch["completion"], weight, (is_masked, p))

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and what it says about the model.

        Returns:
          Scalar float32, and metrics: "loss", "nll_bound" (LLaDA, Eq. 4: an estimate, in nats per
          completion token, of a bound on the negative log-likelihood, whatever the loss's weights),
          "masked_accuracy" (masked tokens whose arg-max is right) and "mask_fraction".
        """
        is_masked, p = said.extra
        stats = vocab.score(vocab.head(params), said.hidden, said.targets)
        is_right = stats.token == said.targets
        loss, metrics = weighted_loss(stats.log_prob, is_right, is_masked, p**self.weight_power)
        nll_bound, _ = weighted_loss(stats.log_prob, is_right, is_masked, p)
        return loss, {**metrics, "nll_bound": nll_bound}

    def _attention(self, batch: Mapping[str, jax.Array], context: Context) -> jax.Array:
        """Packed bits [B, T, ceil(T / 32)] of attention on the way from causal to full."""
        B, T = len(batch["prompt"]), batch["prompt"].shape[1] + batch["completion"].shape[1]
        share = jnp.minimum(context.progress / self.anneal, 1.0)
        key = jax.random.fold_in(context.key, 2)  # 0 and 1 are what `split` makes: the masks' own
        is_open = jax.random.uniform(key, (B, T, T)) < share
        return pack_mask(is_open | jnp.tri(T, dtype=bool)[None])

    def _corrupt(self, shape: tuple[int, ...], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which tokens are masked, [B, G] bool, and with what probability, [B] float32."""
        t_key, mask_key = jax.random.split(key)
        t = _draw_t(t_key, shape[0], self.stratified)
        p = (1 - self.eps) * t + self.eps
        return jax.random.uniform(mask_key, shape) < p[:, None], p


def _draw_t(key: jax.Array, num_rows: int, stratified: bool) -> jax.Array:
    """[B] float32 in [0, 1): each uniform, independent or spread evenly."""
    if not stratified:
        return jax.random.uniform(key, (num_rows,))
    return (jax.random.uniform(key, (1,)) + jnp.arange(num_rows) / num_rows) % 1.0
