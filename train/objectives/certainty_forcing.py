"""Certainty-forcing distillation: a model learns to be sure of many of its own tokens at once.

Reference: Chen et al., "dParallel: Learnable Parallel Decoding for dLLMs", arXiv:2509.26488, Sec. 3
and the public code. Completions are the model's own, decoded one token per step
(`train.collect.trajectories`). Of each row one block is active: what comes before it is given, what
comes after it is all MASK. With masked positions drawn with probability q = (1 - eps) / 2 + eps, a
row is seen twice, as M_1 and as its complement M_2 within the block:

    CE_v  = mean over M_v of -log p(y_i)
    C_v   = positions of M_v whose arg-max is y_i
    ENT_v = mean over C_v of the entropy of softmax(z_i / T)
    loss  = CE_1 + CE_2 + beta (ENT_1 + ENT_2), averaged over rows

The entropy's gradient flows through the probabilities; positions that are predicted wrongly get
none of it. A mean over no position is 0.

The public code draws one block for all rows of a batch and is meant for one row per device; here
each row draws its own. Decode with `EntropyThreshold`.

Letters: B batch, G completion length, A positions of the longest block, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params
from train.losses import certainty_loss, check_certainty
from train.objectives import Context, Predictions, TokenObjective
from train.reading import draw_block, predict_views


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertaintyForcing(TokenObjective):
    """dParallel's training loss.

    Attributes:
      block_len: >= 1, positions per block (LLaDA: 32); None: the whole completion is active
        (Dream).
      beta: >= 0, weight of the entropy (LLaDA: 2, Dream: 1).
      temperature: T > 0 of the entropy.
      eps: q = (1 - eps) / 2 + eps is the probability of being masked in the first view; in [0, 1].
      remat: whether the backward pass recomputes each layer instead of keeping its activations.
    """

    block_len: int | None = 32
    beta: float = 2.0
    temperature: float = 0.5
    eps: float = 1e-3
    remat: bool = False

    def __post_init__(self) -> None:
        check_certainty(self.block_len, self.beta, self.temperature)
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps={self.eps} must be in [0, 1]")

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """Hidden states of the active blocks; the batch's completions are the model's own.

        Raises:
          ValueError: the model has no mask token, or it is shifted and there is no prompt.
        """
        return predict_views(params, cfg, batch, *self._corrupt(batch, context), self.remat)

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, and metrics: see `certainty_loss`."""
        return certainty_loss(vocab.head(params), said, said.extra, self.beta, self.temperature)

    def _corrupt(
        self, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Blocks [B], [B] in completion positions, and [B, A] bool: masked in the first view."""
        B, G = batch["completion"].shape
        block_key, mask_key = jax.random.split(context.key)
        if self.block_len is None:
            start, stop = jnp.zeros(B, jnp.int32), jnp.full(B, G)
        else:
            start, stop = draw_block(block_key, B, G, self.block_len)
        q = (1 - self.eps) * 0.5 + self.eps
        size = G if self.block_len is None else min(self.block_len, G)
        return start, stop, jax.random.uniform(mask_key, (B, size)) < q
