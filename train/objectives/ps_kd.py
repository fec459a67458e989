"""Progressive self-distillation: targets soften towards what the model itself used to say.

Reference: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets"
(PS-KD), arXiv:2006.12000, Eq. 3 to 5. In place of each one-hot target y:

    alpha_s = alpha s                                s: share of the steps done
    target  = (1 - alpha_s) onehot(y) + alpha_s P(x)
    loss    = -sum_v target_v log p_v

with P what the model said earlier about the same input. The source stores P of the epoch before;
over a vocabulary that is impossible, so P is recomputed with a moving average of the parameters
(`optim.ema_decay`), at the cost of one more forward, on the very same corruption of the example. At
the first step alpha_s is 0. No gradient flows into P.

Letters: B batch, n predictions per row, M = B n, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.trainable import Learned
from train.config import build
from train.losses import soft_cross_entropy
from train.objectives import Context, Objective, TokenObjective


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsKd(Objective):
    """Another objective with softened targets.

    Attributes:
      of: a `TokenObjective`, or its config.
      alpha: share of the model's own prediction in the last targets, in [0, 1].
    """

    needs_teacher: ClassVar[bool] = True

    of: Any
    alpha: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must be in [0, 1]")
        if isinstance(self.of, Mapping):
            object.__setattr__(self, "of", build(self.of, "train.objective.of"))
        if not isinstance(self.of, TokenObjective):
            raise ValueError(f"of={type(self.of).__name__} must be a TokenObjective")

    @classmethod
    def example(cls) -> Self:
        return cls(of={"make": "train.objectives.causal:Causal"})

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `beside` is the moving average.

        Returns:
          Scalar float32, and the metrics of `of` with "soft_cross_entropy", that of the model
          under P.
        """
        params, teacher = learned.target, learned.beside
        assert teacher is not None
        said = self.of.predict(params, cfg, batch, context)
        loss, metrics = self.of.score(params, said)
        before = self.of.predict(teacher, cfg, batch, context)
        head, before_head = vocab.head(params), vocab.head(teacher)
        hard = -vocab.score(head, said.hidden, said.targets).log_prob
        soft = soft_cross_entropy(head, said.hidden, before_head, before.hidden)
        alpha = self.alpha * context.progress
        loss = loss + alpha * (said.weight * (soft - hard)).sum()
        total = jnp.maximum(said.weight.sum(), jnp.finfo(jnp.float32).tiny)  # perhaps no token
        soft_mean = (said.weight * soft).sum() / total
        return loss, {**metrics, "loss": loss, "soft_cross_entropy": soft_mean}
