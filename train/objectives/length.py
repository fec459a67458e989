"""A head learns how long the texts still get that a model writes by its own will.

Reference: Yoshida, Goyal and Gimpel, "MAP's not dead yet: Uncovering true language model modes by
conditioning away degeneracy", arXiv:2311.08817, Sec. 5: a classifier of prefixes, trained on the
model's samples, at every position. The loss is the mean, over the tokens of completions but for the
one that ends them, of

    - log q(r | text, token)           r: tokens behind it
    - log q(r or more | text, token)   where the text was cut, so that r is not known

Train on what the model draws at temperature 1 (`python -m scripts.own_texts`): q is about its own
law. The model stays as it is.

Letters: B batch, n positions, N buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm.config import ModelConfig
from dlm.heads.length import LengthHead, bucket_starts, log_buckets, log_within
from dlm.trainable import Learned
from train.objectives import Context, Objective
from train.reading import read_text

NO_END = 2**30
NUM_BINS = 10  # of the calibration error


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthLoss(Objective):
    """Goes with `dlm.heads.length:LengthHead` as `train.trainable`."""

    goes_with = LengthHead

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` are the head's parameters.

        Returns:
          Scalar float32, and metrics: "loss" in nats; of texts that were not cut, "accuracy", how
          often the most probable bucket is right, and "calibration_error", the expected one of its
          probability, in 10 bins (of one batch: more than that of all).
        """
        text = read_text(learned.target, cfg, batch, on_prompt=False)
        P, length = batch["prompt"].shape[1], batch["completion_len"][:, None]
        first = max(P, 1)  # a token behind nothing is not foreseen
        tokens, is_scored = text.tokens[:, first:], text.is_scored[:, first:]
        left = length - 1 - (jnp.arange(tokens.shape[1])[None] + first - P)
        last = jnp.take_along_axis(batch["completion"], length - 1, axis=1)
        has_ended = (last[..., None] == jnp.array(cfg.eos_ids, jnp.int32)[None, None]).any(axis=-1)
        is_scored &= ~has_ended | (left > 0)

        embedded = learned.target["embed"].at[tokens].get(mode="clip")
        hidden = text.hidden[:, first - 1 : -1]
        log_probs = log_buckets(learned.own, *jax.lax.stop_gradient((hidden, embedded)))
        low = jnp.maximum(jnp.where(has_ended, left, left + 1), 1)
        log_q = log_within(log_probs, low, jnp.where(has_ended, low, NO_END))
        loss = -jnp.where(is_scored, log_q, 0.0).sum() / jnp.maximum(is_scored.sum(), 1)

        starts = jnp.asarray(bucket_starts(log_probs.shape[-1])[1:-1])
        is_right = jnp.argmax(log_probs, axis=-1) == jnp.searchsorted(starts, low, side="right")
        is_known = is_scored & has_ended
        num = jnp.maximum(is_known.sum(), 1)
        return loss, {
            "loss": loss,
            "accuracy": (is_known & is_right).sum() / num,
            "calibration_error": _calibration_error(log_probs, is_right, is_known) / num,
        }


def _calibration_error(log_probs: jax.Array, is_right: jax.Array, is_known: jax.Array) -> jax.Array:
    """Scalar float32: how far hits in bins of confidence are from their sum, over all bins.

    Args:
      log_probs: [B, n, N] float32.
      is_right: [B, n] bool. Whether the most probable one of them was.
      is_known: [B, n] bool. Positions that count.
    """
    confidence = jnp.exp(log_probs.max(axis=-1))
    bins = jnp.minimum((confidence * NUM_BINS).astype(jnp.int32), NUM_BINS - 1)
    excess = jnp.where(is_known, confidence - is_right, 0.0)
    return jnp.abs(jnp.zeros(NUM_BINS).at[bins].add(excess)).sum()
