"""Hydra's heads learn the tokens after the next, each seeing the ones before it.

Reference: Ankner et al., arXiv:2402.05109, Sec. 3 and 4, and the public code. As `medusa`, but
head i (from 0) sees the hidden state h_t and the embeddings of tokens t + 1 to t + 1 + i of the
text (teacher forcing), and learns token t + 2 + i. With `teacher` it learns the model's own
distribution of that token instead (Hydra++): the cross-entropy of softmax(head) under it. Hydra++'s
heads see what their own layer makes of h_1 .. h_t in place of h_t.

Letters: B batch, T positions, D model width, J heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.hydra import HydraHeads, head_hidden, read_prefix
from dlm.trainable import Learned
from dlm.window import Window
from train.losses import draft_metrics, score_head, soft_cross_entropy
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class HydraLoss(Objective):
    """Goes with `dlm.heads.hydra:HydraHeads` as `train.trainable`.

    Attributes:
      decay: > 0; of the weight from head to head.
      teacher: whether the model's distribution is learned, not the text.
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = HydraHeads

    decay: float = 0.8
    teacher: bool = False
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch, and the metrics of `MedusaLoss`. Args: likewise."""
        target, own = learned.target, learned.own
        text = read_text(target, cfg, batch, self.on_prompt)
        teacher, ids = vocab.head(target), own.get("ids")
        embedded = target["embed"].at[text.tokens].get(mode="clip")  # [B, T, D]
        total = jnp.float32(0)
        drafts = []
        window = Window.left_padded(text.tokens, text.start, is_causal=True)
        hidden = jax.lax.stop_gradient(text.hidden)
        inputs, _ = read_prefix(own, cfg, hidden, window)
        for i in range(own["unembed"].shape[0]):
            shifted = jnp.pad(embedded[:, 1 + i :], ((0, 0), (0, 1 + i), (0, 0)))
            inputs = jnp.concatenate([inputs, shifted], axis=-1)
            hidden, ahead = head_hidden(own, inputs, i), i + 2
            score = score_head(hidden, own["unembed"][i], text, ahead, ids)
            loss = score.loss
            if self.teacher:
                soft = soft_cross_entropy(
                    own["unembed"][i],
                    hidden[:, :-ahead],
                    teacher if ids is None else teacher[ids],
                    text.hidden[:, ahead - 1 : -1],
                )
                num = jnp.maximum(score.is_learned.sum(), 1)
                loss = jnp.where(score.is_learned, soft, 0.0).sum() / num
            total += self.decay**i * loss
            drafts.append((score.is_right, score.is_scored))
        return total, {"loss": total, **draft_metrics(drafts)}
