"""Differentiable statistics of softmax(hidden @ head.T): what losses are made of, in tiles.

Letters: M rows, D model width, V vocabulary.

The forward pass is `unembed_stats`. The backward pass multiplies each tile of the vocabulary once
more and never stores [M, V] either. With z the logits, p their softmax, H its entropy:

    d log p(target) / dz_v = [v = target] - p_v          dH / dz_v = -p_v (log p_v + H)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.unembed_stats import unembed_stats
from kernels_pallas.unembed_stats.xla import tile_len

VocabAxis = str | tuple[str, ...] | None


class TargetStats(struct.PyTreeNode):
    """What a model says about M targets.

    Attributes:
      log_prob: [M] float32. Log-probability of the target. Differentiable.
      entropy: [M] float32. Of the whole distribution, in nats. Differentiable.
      token: [M] int32. The arg-max.
      max_log_prob: [M] float32. The arg-max's log-probability; no gradient flows through it.
    """

    log_prob: jax.Array
    entropy: jax.Array
    token: jax.Array
    max_log_prob: jax.Array


def unembed_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    vocab_axis: VocabAxis = None,
    cap: float | None = None,
) -> TargetStats:
    """Log-probabilities of targets, and entropies, with gradients for `hidden` and `head`.

    Without a cap, a distribution tempered with temperature t is that of `hidden / t`.

    Args:
      hidden: [M, D]. Final (normalised) hidden states.
      head: [V, D]. The output head.
      targets: [M] int32. Vocabulary ids in [0, V).
      vocab_axis: as for `unembed_stats`.
      cap: logits z become cap tanh(z / cap); None: they do not.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} must be [M={hidden.shape[0]}]")
    return _unembed_loss(vocab_axis, cap, hidden, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _unembed_loss(
    vocab_axis: VocabAxis,
    cap: float | None,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
) -> TargetStats:
    return _forward(vocab_axis, cap, hidden, head, targets)[0]


def _forward(
    vocab_axis: VocabAxis,
    cap: float | None,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
) -> tuple[TargetStats, Any]:
    given_ids = targets[:, None]
    stats = unembed_stats(hidden, head, given_ids=given_ids, vocab_axis=vocab_axis, cap=cap)
    assert stats.given_log_probs is not None
    out = TargetStats(
        log_prob=stats.given_log_probs[:, 0],
        entropy=stats.entropy,
        token=stats.token,
        max_log_prob=stats.log_prob,
    )
    return out, (hidden, head, targets, stats.logsumexp, stats.entropy)


def _backward(
    vocab_axis: VocabAxis, cap: float | None, saved: Any, gradient: TargetStats
) -> tuple[jax.Array, jax.Array, None]:
    hidden, head, targets, logsumexp, entropy = saved
    by_log_prob, by_entropy = gradient.log_prob[:, None], gradient.entropy[:, None]
    first_id = 0
    if vocab_axis is not None:
        # `shard_map` hands every device its share of a replicated output's gradient.
        by_log_prob, by_entropy = jax.lax.psum((by_log_prob, by_entropy), vocab_axis)
        first_id = jax.lax.axis_index(vocab_axis) * head.shape[0]
    M, V = hidden.shape[0], head.shape[0]
    size = tile_len(M, V)
    rows = hidden.astype(head.dtype)

    def tile(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_hidden, by_head = sums
        # The last tile starts early enough to be whole, and skips what was seen already.
        start = jnp.minimum(i * size, V - size)
        row = start + jnp.arange(size)
        weights = jax.lax.dynamic_slice_in_dim(head, start, size)
        z = _product(rows, weights, (1, 1))  # [M, size]
        slope = None
        if cap is not None:
            bent = jnp.tanh(z / cap)
            z, slope = cap * bent, 1 - bent * bent
        log_p = z - logsumexp[:, None]
        p = jnp.exp(log_p)
        is_target = (first_id + row)[None] == targets[:, None]
        dz = by_log_prob * (is_target - p) - by_entropy * p * (log_p + entropy[:, None])
        dz = dz if slope is None else dz * slope
        dz = jnp.where((row >= i * size)[None], dz, 0.0).astype(head.dtype)
        by_hidden = by_hidden + _product(dz, weights, (1, 0))
        old = jax.lax.dynamic_slice_in_dim(by_head, start, size)
        new = old + _product(dz, rows, (0, 0)).astype(head.dtype)
        return by_hidden, jax.lax.dynamic_update_slice_in_dim(by_head, new, start, axis=0)

    # Rows of the head get all of their gradient from one tile: rounded once, as it is stored.
    zeros = (jnp.zeros(hidden.shape, _sum_dtype(head)), jnp.zeros_like(head))
    by_hidden, by_head = jax.lax.fori_loop(0, -(-V // size), tile, zeros)
    return by_hidden.astype(hidden.dtype), by_head, None


_unembed_loss.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=_sum_dtype(b))


def _sum_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
