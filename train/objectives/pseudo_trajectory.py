"""Pseudo-trajectory distillation: masks follow the order in which the teacher decided.

Reference: Qian et al., "d3LLM: Ultra-Fast Diffusion LLM using Pseudo-Trajectory Distillation",
arXiv:2601.07568, Sec. 3.1, and the public code. As `certainty_forcing`, but which positions of the
active block are masked is not drawn: with mask ratio t and a block of A positions, the
floor((1 - t) A) that the teacher decided first are shown, the others are masked; the second view is
the complement. A curriculum widens blocks and raises t: after a share s of the steps

    A    = floor(lerp(block_lens, s))         by steps through `block_lens`
    low  = lerp(ratios, s)
    t    ~ Uniform(low, ratios[1])            one draw per row (the public code: per batch)
    loss = CE_1 + CE_2 + beta ENT_1

The public code divides the loss by 4, which Adam does not notice. Decode with `EntropyThreshold`,
several blocks at a time with `MultiBlock`.

Letters: as `certainty_forcing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params
from train.config import ConfigError
from train.losses import certainty_loss, check_certainty
from train.objectives import Context, Predictions, TokenObjective
from train.reading import draw_block, predict_views


@dataclasses.dataclass(frozen=True, kw_only=True)
class PseudoTrajectory(TokenObjective):
    """d3LLM's training loss.

    Attributes:
      block_lens: >= 1 each, positions per block, in the course of training.
      ratios: the lowest mask ratio at first, and the highest at all times; in [0, 1].
      beta: >= 0, weight of the entropy.
      temperature: > 0, of the entropy.
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    block_lens: tuple[int, ...] = (16, 32)
    ratios: tuple[float, float] = (0.0, 0.8)
    beta: float = 2.0
    temperature: float = 0.5
    remat: bool = False

    def __post_init__(self) -> None:
        if not self.block_lens:
            raise ValueError("block_lens=() must have at least one length")
        for block_len in self.block_lens:
            check_certainty(block_len, self.beta, self.temperature)
        if len(self.ratios) != 2 or not 0 <= self.ratios[0] <= self.ratios[1] <= 1:
            raise ValueError(f"ratios={self.ratios} must be two rising numbers in [0, 1]")

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states of the active blocks; the batch has a "step_map".

        Raises:
          ValueError: it has none, the model has no mask token, or it is shifted and there is no
            prompt.
        """
        return predict_views(params, cfg, batch, *self._corrupt(batch, context), self.remat)

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and metrics: see `certainty_loss`. Only the first view's entropy is lowered."""
        return certainty_loss(vocab.head(params), said, said.extra[:1], self.beta, self.temperature)

    def _corrupt(
        self, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `CertaintyForcing._corrupt`."""
        if "step_map" not in batch:
            raise ConfigError(
                "the batch has no step_map: train on what `python -m train.collect.trajectories` "
                "wrote"
            )
        B, G = batch["completion"].shape
        progress = jnp.asarray(context.progress, jnp.float32)
        lengths = jnp.array(self.block_lens, jnp.float32)
        stage = progress * (len(self.block_lens) - 1)
        block_len = jnp.interp(stage, jnp.arange(len(self.block_lens)), lengths).astype(jnp.int32)
        block_key, ratio_key = jax.random.split(context.key)
        start, stop = draw_block(block_key, B, G, block_len)
        first, high = self.ratios
        low = first + progress * (high - first)
        ratio = jax.random.uniform(ratio_key, (B, 1), minval=low, maxval=high)

        index = start[:, None] + jnp.arange(min(max(self.block_lens), G))[None]  # [B, A]
        is_active = index < stop[:, None]
        order = jnp.take_along_axis(batch["step_map"], jnp.minimum(index, G - 1), axis=1)
        last = jnp.iinfo(jnp.int32).max
        order = jnp.where(is_active & (order >= 0), order, last)  # never decided: last of all
        rank = jnp.argsort(jnp.argsort(order, axis=1, stable=True), axis=1)
        shown = jnp.floor((1 - ratio) * (stop - start)[:, None])
        return start, stop, rank >= shown
