"""Block diffusion: autoregression over blocks, masked diffusion inside them.

Reference: Arriola et al., "Block Diffusion: Interpolating Between Autoregressive and Diffusion
Language Models" (BD3-LM), arXiv:2503.09573, Sec. 3; also what turns an autoregressive model into
one with an exact cache (SDAR, arXiv:2510.06303; Fast-dLLM v2, arXiv:2509.26328). With t drawn for
every block, each completion token of it is MASK with probability p = (1 - eps) t + eps; one pass
over [noisy ; clean] predicts every block from the clean blocks before it:

    loss = 1/G * sum over masked tokens of  -log p_theta(x_i | clean blocks before, noisy block) / p

averaged over rows; the network sees neither t nor p. Blocks are counted from the start of the
prompt, as `BlockCausal` decodes them; prompt tokens are never masked. For a model with shifted
logits a block's first token is predicted from the last position of the clean block before it.

Letters: B batch, P prompt length, G completion length, L = P + G rounded up to whole blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab, window
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from train.objectives import Context, Predictions, TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusion(TokenObjective):
    """BD3-LM's training loss.

    Attributes:
      block_len: >= 1, positions per block; decode with the same.
      eps: the smallest masking probability; in (0, 1).
      weight_power: a in [0, 1]; masked tokens are weighted by p^-a. 1: the published bound.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    block_len: int = 32
    eps: float = 1e-3
    weight_power: float = 1.0
    remat: bool = False

    def __post_init__(self) -> None:
        if self.block_len < 1:
            raise ValueError(f"block_len={self.block_len} must be at least 1")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps} must be in (0, 1)")
        if not 0 <= self.weight_power <= 1:
            raise ValueError(f"weight_power={self.weight_power} must be in [0, 1]")

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states [B, G, D] of the noisy completions.

        Raises:
          ValueError: the model has no mask token, or it is shifted and there is no prompt.
        """
        if cfg.mask_token_id is None:
            raise ValueError("mask_token_id=None must be a token id for block diffusion")
        prompt, completion, start = batch["prompt"], batch["completion"], batch["prompt_start"]
        if cfg.shifted_logits and prompt.shape[1] == 0:
            raise ValueError("prompt_len=0 must be at least 1 for a model with shifted_logits")
        (B, P), G, C = prompt.shape, completion.shape[1], self.block_len
        L = -(-(P + G) // C) * C

        # Rows move to the left, so that blocks start where the prompt does.
        source = jnp.arange(L)[None] + start[:, None]  # [B, L]
        is_real = source < P + G
        tokens = jnp.concatenate([prompt, completion], axis=1)
        clean = jnp.take_along_axis(tokens, jnp.minimum(source, P + G - 1), axis=1)
        t_key, mask_key = jax.random.split(context.key)
        p = (1 - self.eps) * jax.random.uniform(t_key, (B, L // C)) + self.eps
        p = jnp.repeat(p, C, axis=1)  # [B, L]
        is_masked = is_real & (source >= P) & (jax.random.uniform(mask_key, (B, L)) < p)
        noisy = jnp.where(is_masked, cfg.mask_token_id, clean)

        both = window.Window(
            tokens=jnp.concatenate([noisy, clean], axis=1),
            positions=jnp.broadcast_to(jnp.tile(jnp.arange(L), 2)[None], (B, 2 * L)),
            mask=window.BlockDiffusion((~is_real).astype(jnp.int32), C),
        )
        hidden = decoder.forward(params, cfg, both, remat=self.remat).hidden
        index = jnp.arange(G)[None] + P - start[:, None]  # [B, G], where completions lie in rows
        read = index
        if cfg.shifted_logits:
            read = jnp.where(index % C == 0, L + index - 1, index - 1)
        weight = is_masked / p**self.weight_power / (B * G)
        return Predictions(
            hidden=jnp.take_along_axis(hidden, read[..., None], axis=1),
            targets=completion,
            weight=jnp.take_along_axis(weight, index, axis=1),
        )

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and metrics: "loss" and "masked_accuracy"."""
        stats = vocab.score(vocab.head(params), said.hidden, said.targets)
        loss = -(said.weight * stats.log_prob).sum()
        is_scored = said.weight > 0
        is_right = (stats.token == said.targets) & is_scored
        return loss, {
            "loss": loss,
            "masked_accuracy": is_right.sum() / jnp.maximum(is_scored.sum(), 1),
        }
