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
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.params import Params
from train.config import build
from train.objectives import Context, TokenObjective

CHUNK = 128  # rows whose logits over the vocabulary are in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsKd:
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

    def loss(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `train.objectives`, with a teacher.

        Returns:
          Scalar float32, and the metrics of `of` with "soft_cross_entropy", that of the model
          under P.
        """
        assert context.teacher is not None
        said = self.of.predict(params, cfg, batch, context)
        loss, metrics = self.of.score(params, said)
        before = self.of.predict(context.teacher, cfg, batch, context)
        head, teacher = vocab.head(params), vocab.head(context.teacher)
        hard = -vocab.score(head, said.hidden, said.targets).log_prob
        soft = soft_cross_entropy(head, said.hidden, teacher, before.hidden)
        alpha = self.alpha * context.progress
        loss = loss + alpha * (said.weight * (soft - hard)).sum()
        total = jnp.maximum(said.weight.sum(), jnp.finfo(jnp.float32).tiny)  # perhaps no token
        soft_mean = (said.weight * soft).sum() / total
        return loss, {**metrics, "loss": loss, "soft_cross_entropy": soft_mean}


def soft_cross_entropy(
    head: jax.Array, hidden: jax.Array, teacher: jax.Array, teacher_hidden: jax.Array
) -> jax.Array:
    """-sum_v P_v log p_v with P the teacher's law; logits of `CHUNK` rows exist at a time.

    Args:
      head: [V, D]. The model's output head.
      hidden: [B, n, D]. Its final hidden states.
      teacher: [V, D']. The teacher's output head.
      teacher_hidden: [B, n, D']. The teacher's hidden states for the same positions.

    Returns:
      [B, n] float32. No gradient flows to the teacher.
    """
    teacher, teacher_hidden = jax.lax.stop_gradient((teacher, teacher_hidden))

    def one_chunk(ours: jax.Array, theirs: jax.Array) -> jax.Array:
        z, p = vocab.logits(head, ours), jax.nn.softmax(vocab.logits(teacher, theirs))
        return jax.nn.logsumexp(z, axis=-1) - (p * z).sum(axis=-1)

    return in_chunks(one_chunk, hidden, teacher_hidden)


def in_chunks(function: Callable[..., Any], *hidden: jax.Array) -> Any:
    """A function of hidden states [n, D], `CHUNK` rows at a time, which are recomputed backwards.

    Args:
      function: gives a tree of [n].
      *hidden: [B, T, D] each, D may differ.

    Returns:
      The tree of [B, T].
    """
    B, T = hidden[0].shape[:2]

    def chunked(x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        size = min(CHUNK, len(flat))
        return jnp.pad(flat, ((0, -len(flat) % size), (0, 0))).reshape(-1, size, x.shape[-1])

    one = jax.checkpoint(lambda rows: function(*rows))
    out = jax.lax.map(one, tuple(chunked(x) for x in hidden))
    return jax.tree.map(lambda x: x.reshape(-1)[: B * T].reshape(B, T), out)
