"""Losses that several objectives share, from hidden states and from probabilities.

Letters: B batch, n predictions per row, G completion length, A positions of the longest block, T
positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlm import vocab
from train.config import ConfigError
from train.objectives import Predictions, row_mean_weight
from train.reading import Text

CHUNK = 128  # rows whose logits over the vocabulary are in memory at a time


def mean_cross_entropy(
    log_prob: jax.Array, is_right: jax.Array, is_scored: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy over the tokens that count.

    Args:
      log_prob: [B, n] float32. Of the right token.
      is_right: [B, n] bool. Whether it is the model's arg-max.
      is_scored: [B, n] bool.

    Returns:
      Scalar float32, and the metrics of `Causal.score`.
    """
    total = jnp.maximum(is_scored.sum(), 1)
    loss = jnp.where(is_scored, -log_prob, 0.0).sum() / total
    return loss, {"loss": loss, "accuracy": (is_right & is_scored).sum() / total}


def weighted_loss(
    log_prob: jax.Array, is_right: jax.Array, is_masked: jax.Array, p: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of masked tokens over their row's p and over G, averaged over rows.

    Args:
      log_prob: [B, G] float32. Of the right token at each position.
      is_right: [B, G] bool. Whether it is the model's arg-max.
      is_masked: [B, G] bool. Which tokens the model did not see.
      p: [B] float32. What a row's sum is divided by: the probability with which its tokens were
        masked, or a power of it.

    Returns:
      Scalar float32, and the metrics of `MaskedDiffusion.score` but for its bound.
    """
    per_row = jnp.where(is_masked, -log_prob, 0.0).sum(axis=1) / p / is_masked.shape[1]
    loss = per_row.mean()
    return loss, {
        "loss": loss,
        "masked_accuracy": (is_right & is_masked).sum() / jnp.maximum(is_masked.sum(), 1),
        "mask_fraction": is_masked.mean(),
    }


def soft_cross_entropy(
    head: vocab.Head, hidden: jax.Array, teacher: vocab.Head, teacher_hidden: jax.Array
) -> jax.Array:
    """-sum_v P_v log p_v with P the teacher's distribution; logits of `CHUNK` rows exist at a time.

    Args:
      head: the model's output head.
      hidden: [B, n, D]. Its final hidden states.
      teacher: the teacher's output head.
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


def certainty_loss(
    head: vocab.Head,
    said: Predictions,
    in_view: jax.Array,
    beta: float,
    temperature: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """CE plus beta times ENT.

    Args:
      head: the model's output head.
      said: its predictions, [B, A].
      in_view: [n, B, A] bool. Positions whose entropy is lowered, one mean per view; none of them
        in two views.
      beta: weight of the entropy.
      temperature: at which it is taken.

    Returns:
      Scalar float32, and metrics: "loss", "cross_entropy" (CE_1 + CE_2), "entropy" (the sum of
      ENT_v, in nats) and "masked_accuracy" (active tokens whose arg-max is right).
    """
    if temperature != 1 and isinstance(head, vocab.CappedHead):
        raise ConfigError(
            f"temperature={temperature} must be 1 for a model whose logits are capped"
        )
    stats = vocab.score(head, said.hidden, said.targets)
    cross_entropy = -(said.weight * stats.log_prob).sum()
    is_right = stats.token == said.targets
    weight = sum(row_mean_weight(view & is_right) for view in in_view)
    entropy = vocab.score(head, said.hidden / temperature, said.targets).entropy
    entropy = (weight * entropy).sum()
    loss = cross_entropy + beta * entropy
    is_scored = said.weight > 0
    return loss, {
        "loss": loss,
        "cross_entropy": cross_entropy,
        "entropy": entropy,
        "masked_accuracy": (is_right & is_scored).sum() / jnp.maximum(is_scored.sum(), 1),
    }


def check_certainty(block_len: int | None, beta: float, temperature: float) -> None:
    """Raises ValueError on fields out of range."""
    if block_len is not None and block_len < 1:
        raise ValueError(f"block_len={block_len} must be at least 1, or None")
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be at least 0")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


class HeadScore(NamedTuple):
    """What a head about token t + ahead makes of positions t.

    Attributes:
      loss: scalar float32. Its mean cross-entropy.
      is_right: [B, T - ahead] bool. Whether the token is its arg-max.
      is_scored: likewise. Whether the token counts.
      is_learned: likewise. Whether it is learned: whether it counts and the head can draft it.
    """

    loss: jax.Array
    is_right: jax.Array
    is_scored: jax.Array
    is_learned: jax.Array


def score_head(
    hidden: jax.Array,
    unembed: vocab.Head,
    text: Text,
    ahead: int,
    ids: jax.Array | None = None,
) -> HeadScore:
    """What a head is worth.

    Args:
      hidden: [B, T, D]. What the head multiplies with its matrix.
      unembed: [U, D], its matrix; or a model's head.
      text: of `read_text`.
      ahead: the head at t is about token t + ahead.
      ids: [U] int32, ascending. The tokens it can draft; None: all.
    """
    targets = text.tokens[:, ahead:]
    is_learned = is_scored = text.is_scored[:, ahead:] & (
        jnp.arange(targets.shape[1])[None] >= text.start[:, None]
    )
    if ids is not None:
        place = jnp.searchsorted(ids, targets)
        can_draft = ids.at[place].get(mode="clip") == targets
        is_learned, targets = is_scored & can_draft, jnp.where(can_draft, place, 0)
    stats = vocab.score(unembed, hidden[:, :-ahead], targets)
    num = jnp.maximum(is_learned.sum(), 1)
    loss = jnp.where(is_learned, -stats.log_prob, 0.0).sum() / num
    is_right = stats.token == targets
    return HeadScore(loss, is_right if ids is None else is_right & can_draft, is_scored, is_learned)


def draft_metrics(drafts: Sequence[tuple[jax.Array, jax.Array]]) -> dict[str, jax.Array]:
    """How good a chain of drafts is, simulated on a text: a round begins at each of its positions.

    Args:
      drafts: of each draft j (from 0) two arrays [B, n_j] bool, n_j not rising: whether it is the
        token of the text, and whether that token counts, for every position that begins a round.

    Returns:
      "accuracy_2", "accuracy_3", .. for the second, third, .. token after a position: shares of the
      tokens that count. "acceptance_length": mean tokens per forward of the target, its own one
      included, of drafts that are accepted up to the first wrong one.
    """
    metrics, length = {}, jnp.float32(1)
    accepted = drafts[0][1]
    num_roots = jnp.maximum(accepted.sum(), 1)
    for j, (is_right, is_scored) in enumerate(drafts):
        num = jnp.maximum(is_scored.sum(), 1)
        metrics[f"accuracy_{j + 2}"] = (is_right & is_scored).sum() / num
        accepted = accepted[:, : is_right.shape[1]] & is_right & is_scored
        length += accepted.sum() / num_roots
    return {**metrics, "acceptance_length": length}
