"""Medusa's heads learn the tokens after the next, beside a model that stays as it is (Medusa-1).

Reference: Cai et al., arXiv:2401.10774, Sec. 2.2.1. With h_t the model's hidden state at t, which
predicts token t + 1, head k (from 0) learns token t + 2 + k:

    loss = sum_k decay^k  mean over t of  -log p_k(x_{t+2+k} | h_t)

over tokens of completions up to their first EOS, as `Causal`.

Letters: B batch, T positions, G completion length, D model width, J heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm.config import ModelConfig
from dlm.heads.medusa import MedusaHeads, head_hidden
from dlm.trainable import Learned
from train.losses import draft_metrics, score_head
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaLoss(Objective):
    """Goes with `dlm.heads.medusa:MedusaHeads` as `train.trainable`.

    Attributes:
      decay: > 0; of the weight from head to head (published: 0.8).
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = MedusaHeads

    decay: float = 0.8
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` are heads.

        Returns:
          Scalar float32, and metrics: "loss", and those of `train.losses.draft_metrics`.
        """
        own = learned.own
        text = read_text(learned.target, cfg, batch, self.on_prompt)
        total, drafts = jnp.float32(0), []
        for k in range(own["unembed"].shape[0]):
            hidden = head_hidden(own, text.hidden, k)
            score = score_head(hidden, own["unembed"][k], text, k + 2, own.get("ids"))
            total += self.decay**k * score.loss
            drafts.append((score.is_right, score.is_scored))
        return total, {"loss": total, **draft_metrics(drafts)}
