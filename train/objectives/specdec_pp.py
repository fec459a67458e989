"""SpecDec++'s head learns which drafts of a draft model its target accepts.

Reference: Huang et al., "SpecDec++", arXiv:2405.19715, Sec. 3.3, and the public code. At each
position of a text x of the target the draft model draws a token Z behind what is x before it, which
the target would accept with probability

    a = min(1, p(Z) / q(Z))

A share of the tokens is then x's own and has no label, the others are Z: so contexts have the
errors of drafts. The draft model reads this mixed text, and the head says P of each Z. The loss is

    - sum a log P + weight (1 - a) log(1 - P)   over   sum a + weight (1 - a)

Both models stay as they are: the run's own model (`train.init_from`) is the draft model.

Letters: B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from decode.core.sampling import draw
from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.specdec_pp import Judged, StopHead, log_verdict
from dlm.trainable import Learned
from train.losses import in_chunks
from train.objectives import Context, Objective
from train.reading import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopLoss(Objective):
    """Goes with `dlm.heads.specdec_pp:StopHead` as `train.trainable`.

    Attributes:
      weight: > 0, of rejection (published: 6).
      share: in [0, 1], of the tokens that are the text's own (published: 0.15).
      temperature: >= 0, at which drafts are drawn and judged; 0: the most probable ones, accepted
        if they are the target's. Train for the one that is decoded with.
      on_prompt: whether drafts in the prompt are learned too.
    """

    goes_with = StopHead

    weight: float = 6.0
    share: float = 0.15
    temperature: float = 1.0
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight={self.weight} must be positive")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} must be in [0, 1]")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` is a head, `beside` the target.

        Returns:
          Scalar float32, and metrics: "loss", "acceptance", the mean of a, and
          "predicted_acceptance", that of P, which the weight keeps below.
        """
        head: Judged = learned.own
        assert learned.beside is not None
        text = read_text(learned.target, cfg, batch, self.on_prompt)
        theirs = read_text(learned.beside, head.target, batch, self.on_prompt)
        of_draws, of_mixing = jax.random.split(context.key)
        drafts, accepted = self._draft(learned, text.hidden, theirs.hidden, of_draws)
        is_draft = text.is_scored & (jax.random.uniform(of_mixing, text.tokens.shape) >= self.share)
        mixed = jnp.where(is_draft, drafts, text.tokens)
        P = batch["prompt"].shape[1]
        noisy = {**batch, "prompt": mixed[:, :P], "completion": mixed[:, P:]}
        hidden = jax.lax.stop_gradient(read_text(learned.target, cfg, noisy, self.on_prompt).hidden)
        log_p = log_verdict(head.params, hidden)
        good = jnp.where(is_draft, accepted, 0)
        bad = self.weight * jnp.where(is_draft, 1 - accepted, 0)
        loss = -(good * log_p[..., 1] + bad * log_p[..., 0]).sum()
        loss /= jnp.maximum((good + bad).sum(), 1e-6)
        num = jnp.maximum(is_draft.sum(), 1)
        return loss, {
            "loss": loss,
            "acceptance": good.sum() / num,
            "predicted_acceptance": jnp.where(is_draft, jnp.exp(log_p[..., 1]), 0).sum() / num,
        }

    def _draft(
        self, learned: Learned, ours: jax.Array, theirs: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """A draft at every position but the first [B, T] int32, and its a [B, T] float32."""
        draft, target = learned.target, learned.beside
        assert target is not None

        def one_chunk(ours: jax.Array, theirs: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
            q, p = (
                self._law(vocab.logits(vocab.head(params), hidden))
                for params, hidden in ((draft, ours), (target, theirs))
            )
            token = draw(key, q)
            of_token = lambda law: jnp.take_along_axis(law, token[:, None], axis=1)[:, 0]  # noqa: E731
            return token, jnp.minimum(1, of_token(p) / jnp.maximum(of_token(q), 1e-38))

        B, T = ours.shape[:2]
        bits = jax.random.bits(key, (B, T - 1, 2), jnp.uint32)
        found = in_chunks(one_chunk, *jax.lax.stop_gradient((ours[:, :-1], theirs[:, :-1])), bits)
        token, accepted = (jnp.pad(x, ((0, 0), (1, 0))) for x in found)
        return token, jax.lax.stop_gradient(accepted)

    def _law(self, logits: jax.Array) -> jax.Array:
        """[n, V] float32 that tokens are drawn from."""
        if self.temperature == 0:
            return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        return jax.nn.softmax(logits / self.temperature, axis=-1)
