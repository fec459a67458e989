"""A draft model learns the target where it can: on tokens that another one has learned.

Reference: Hu et al., "AdaSPEC: Selective Knowledge Distillation for Efficient Speculative
Decoders", arXiv:2510.19779, Sec. 3. A reference, the same draft model after plain distillation
(`distill_spec` with "kl"), tells which tokens are within reach of a model of this size. With p, q
and r the distributions of target, draft and reference, per token of the completions

    gap = KL(p || q) - KL(p || r)
    loss = mean of KL(p || q) over the share of the batch's tokens that have the largest gaps

No gradient flows through gaps, target or reference.

Letters: B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.draft_lm import Draft, DraftLM
from dlm.trainable import Learned, Trainable
from train.losses import in_chunks
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaSpec(Objective):
    """Goes with `dlm.heads.draft_lm:DraftLM` with a `reference` as `train.trainable`.

    Attributes:
      share: of tokens that are learned, in (0, 1] (published: 0.4); 1: plain distillation.
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = DraftLM

    share: float = 0.4
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be in (0, 1]")

    def refuse(self, trainable: Trainable) -> str | None:
        if isinstance(trainable, DraftLM) and not trainable.reference:
            return "train.trainable.reference='' must be the folder of a draft model"
        return super().refuse(trainable)

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` is a draft, `beside` the reference.

        Returns:
          Scalar float32, and metrics: "loss", "acceptance" as `DistillSpec`, over all tokens, and
          "gap", the mean of those learned.
        """
        assert learned.beside is not None
        ours: Draft = learned.own
        target, reference = learned.target, learned.beside
        frozen = jax.lax.stop_gradient(
            (
                read_text(target, cfg, batch, self.on_prompt).hidden[:, :-1],
                read_text(reference, ours.cfg, batch, self.on_prompt).hidden[:, :-1],
            )
        )
        text = read_text(ours.params, ours.cfg, batch, self.on_prompt)

        def one_chunk(
            hidden: jax.Array, of_target: jax.Array, of_reference: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            log_p, log_q, log_r = (
                jax.nn.log_softmax(vocab.logits(vocab.head(own), x))
                for own, x in (
                    (target, of_target), (ours.params, hidden), (reference, of_reference),
                )
            )  # fmt: skip
            log_p, log_r = jax.lax.stop_gradient((log_p, log_r))
            p = jnp.exp(log_p)
            kl = (p * (log_p - log_q)).sum(axis=-1)
            gap = jax.lax.stop_gradient(kl) - (p * (log_p - log_r)).sum(axis=-1)
            return kl, gap, jnp.minimum(p, jnp.exp(log_q)).sum(axis=-1)

        kl, gap, accepted = in_chunks(one_chunk, text.hidden[:, :-1], *frozen)
        is_scored = text.is_scored[:, 1:]
        chosen = largest(gap, is_scored, self.share)
        mean = lambda x, mask: jnp.where(mask, x, 0.0).sum() / jnp.maximum(mask.sum(), 1)  # noqa: E731
        loss = mean(kl, chosen)
        return loss, {
            "loss": loss, "acceptance": mean(accepted, is_scored), "gap": mean(gap, chosen)
        }  # fmt: skip


def largest(values: jax.Array, is_scored: jax.Array, share: float) -> jax.Array:
    """[B, n] bool: the `share` of the entries that count with the largest values, rounded up.

    Of equal values the first ones are taken.
    """
    flat = jnp.where(is_scored, values, -jnp.inf).reshape(-1)
    order = jnp.argsort(-flat, stable=True)
    rank = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    num = jnp.ceil(share * is_scored.sum() - 1e-4)  # 0.4 of 5 is two, whatever float32 says
    return is_scored & (rank.reshape(is_scored.shape) < num)
