"""The contract of `unembed_stats`, spelled out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.unembed_stats.noise import Noise, gumbel_noise
from kernels_pallas.unembed_stats.summary import VocabStats, ban


def unembed_stats_reference(
    hidden: jax.Array,
    head: jax.Array,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
    cap: float | None = None,
) -> VocabStats:
    """The contract in float32 with all logits in memory. Args: as `unembed_stats`."""
    z = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T  # [M, V]
    z = z if cap is None else cap * jnp.tanh(z / cap)
    z = ban(z, jnp.arange(head.shape[0]), banned_ids)
    log_probs = jax.nn.log_softmax(z)
    probs = jnp.exp(log_probs)
    token = jnp.argmax(z, axis=-1).astype(jnp.int32)
    is_token = jnp.arange(head.shape[0])[None] == token[:, None]
    rest = jnp.where(is_token, 0.0, jnp.exp(z - z.max(axis=-1, keepdims=True))).sum(axis=-1)
    second = jnp.where(is_token, -jnp.inf, log_probs).max(axis=-1)
    stats = VocabStats(
        token=token,
        log_prob=-jnp.log1p(rest),
        second_log_prob=second,
        entropy=-jnp.where(probs > 0, probs * log_probs, 0.0).sum(axis=-1),
        logsumexp=jax.nn.logsumexp(z, axis=-1),
    )
    if noise is not None:
        gumbel = gumbel_noise(noise.key, jnp.arange(head.shape[0]))
        sample = jnp.argmax(z + noise.temperature * gumbel, axis=-1).astype(jnp.int32)
        sample_log_prob = jnp.take_along_axis(log_probs, sample[:, None], axis=-1)[:, 0]
        sample_log_prob = jnp.where(sample == token, stats.log_prob, sample_log_prob)
        stats = stats.replace(sample=sample, sample_log_prob=sample_log_prob)
    if k:
        values, tokens = jax.lax.top_k(log_probs, k)
        stats = stats.replace(top_tokens=tokens.astype(jnp.int32), top_log_probs=values)
    if given_ids is not None:
        stats = stats.replace(given_log_probs=jnp.take_along_axis(log_probs, given_ids, axis=-1))
    return stats
