"""A draft model learns the target's distribution, so that more of what it drafts is accepted.

Reference: Zhou et al., "DistillSpec: Improving Speculative Decoding via Knowledge Distillation",
arXiv:2310.08461, Sec. 4. With p the target's distribution of the next token and q the draft's, per
token

    kl           sum_x p log(p / q)
    reverse_kl   sum_x q log(q / p)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m),   m = beta p + (1 - beta) q
    tv           sum_x |p - q| / 2     one minus the probability that a draft is accepted
    nla          -log sum_x min(p, q)

averaged over the tokens of completions up to their first EOS. Train on the target's own texts
(`train.collect.trajectories`, or any text). No gradient flows to the target.

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
from dlm.trainable import Learned
from train.losses import draft_metrics, in_chunks
from train.objectives import Context, Objective
from train.reading import read_text

NUM_DRAFTS = 4  # of the chains of which acceptance is simulated
DIVERGENCES = ("kl", "reverse_kl", "jsd", "tv", "nla")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSpec(Objective):
    """Goes with `dlm.heads.draft_lm:DraftLM` as `train.trainable`.

    Attributes:
      divergence: one of `DIVERGENCES`. "tv" and "nla" hardly move a draft that is far from the
        target: begin with "kl".
      beta: of "jsd", in (0, 1).
      temperature: > 0; of both distributions.
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = DraftLM

    divergence: str = "kl"
    beta: float = 0.5
    temperature: float = 1.0
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence={self.divergence!r} must be one of {DIVERGENCES}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta={self.beta} must be in (0, 1)")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` is a draft.

        Returns:
          Scalar float32, and metrics: "loss", "acceptance", the mean of sum_x min(p, q): the
          probability that a drawn draft is accepted, and "acceptance_length" of
          `train.losses.draft_metrics`, of chains of `NUM_DRAFTS`.
        """
        draft: Draft = learned.own
        target = learned.target
        theirs = read_text(target, cfg, batch, self.on_prompt)
        ours = read_text(draft.params, draft.cfg, batch, self.on_prompt)

        def one_chunk(
            hidden: jax.Array, target_hidden: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            log_p, log_q = (
                jax.nn.log_softmax(vocab.logits(vocab.head(own), x) / self.temperature)
                for own, x in ((target, target_hidden), (draft.params, hidden))
            )
            token = jnp.argmax(log_q, axis=-1)
            return *self._divergence(jax.lax.stop_gradient(log_p), log_q), token

        each, accepted, token = in_chunks(
            one_chunk, ours.hidden[:, :-1], jax.lax.stop_gradient(theirs.hidden[:, :-1])
        )
        is_scored = ours.is_scored[:, 1:]
        total = jnp.maximum(is_scored.sum(), 1)
        loss, acceptance = (jnp.where(is_scored, x, 0.0).sum() / total for x in (each, accepted))
        is_right = token == ours.tokens[:, 1:]
        drafts = [(is_right[:, j:], is_scored[:, j:]) for j in range(1, 1 + NUM_DRAFTS)]
        length = draft_metrics(drafts)["acceptance_length"]
        return loss, {"loss": loss, "acceptance": acceptance, "acceptance_length": length}

    def _divergence(self, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of distributions [n, V]: the divergence and the probability of acceptance, [n] each."""
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        accepted = jnp.minimum(p, q).sum(axis=-1)
        kl = lambda p, log_p, log_q: (p * (log_p - log_q)).sum(axis=-1)  # noqa: E731
        if self.divergence == "kl":
            return kl(p, log_p, log_q), accepted
        if self.divergence == "reverse_kl":
            return kl(q, log_q, log_p), accepted
        if self.divergence == "tv":
            return 1 - accepted, accepted
        if self.divergence == "nla":
            return -jnp.log(accepted), accepted
        beta = self.beta
        log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
        return beta * kl(p, log_p, log_m) + (1 - beta) * kl(q, log_q, log_m), accepted
