"""A model and Medusa's heads learn together (Medusa-2).

Reference: Cai et al., arXiv:2401.10774, Sec. 2.2.2 and 2.3.2. Beside the heads' loss (`medusa`),
which now reaches the model too, the model keeps learning the text,

    loss = L_LM + weight * L_Medusa

or, by self-distillation, what it used to say: then L_LM is the cross-entropy of its distribution
under that of the model as it was.

Letters: B batch, T positions, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.medusa import head_hidden
from dlm.heads.medusa_2 import MedusaJoint
from dlm.trainable import Learned
from train.losses import draft_metrics, score_head, soft_cross_entropy
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medusa2Loss(Objective):
    """Goes with `dlm.heads.medusa_2:MedusaJoint` as `train.trainable`.

    Attributes:
      weight: of the heads, >= 0 (published: about 0.2).
      decay: > 0; of the weight from head to head (published: 0.8).
      from_itself: whether the model learns what it used to say, not the text.
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = MedusaJoint

    weight: float = 0.2
    decay: float = 0.8
    from_itself: bool = False
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight} must be at least 0")
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `learned` as `MedusaJoint` gives it.

        Returns:
          Scalar float32, and metrics: "loss", "model_loss" (L_LM), and "accuracy_1" of the model
          and those of `train.losses.draft_metrics` of the heads.
        """
        model, own, original = learned.target, learned.own, learned.beside
        assert original is not None
        text = read_text(model, cfg, batch, self.on_prompt)
        head = vocab.head(model)
        score = score_head(text.hidden, head, text, ahead=1)
        total, num = score.loss, jnp.maximum(score.is_scored.sum(), 1)
        accuracy = (score.is_right & score.is_scored).sum() / num
        if self.from_itself:
            before = read_text(original, cfg, batch, self.on_prompt)
            teacher = vocab.head(original)
            each = soft_cross_entropy(head, text.hidden[:, :-1], teacher, before.hidden[:, :-1])
            total = jnp.where(score.is_scored, each, 0.0).sum() / num
        metrics = {"model_loss": total, "accuracy_1": accuracy}
        drafts = []
        for k in range(own["unembed"].shape[0]):
            hidden = head_hidden(own, text.hidden, k)
            score = score_head(hidden, own["unembed"][k], text, ahead=k + 2)
            total += self.weight * self.decay**k * score.loss
            drafts.append((score.is_right, score.is_scored))
        return total, {"loss": total, **metrics, **draft_metrics(drafts)}
