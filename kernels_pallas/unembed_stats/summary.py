"""What a tile of the vocabulary contributes, how tiles are merged, and what they say.

Letters: M rows (positions), n columns of a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.few_rows import MOST_ROWS
from kernels_pallas.unembed_stats.noise import Noise, gumbel_noise

Summary = dict[str, jax.Array]  # columns of numbers per row, see `merge`

NO_ID = 2**31 - 1

SEVERAL = 16  # rows; fewer of them fill no registers of a CPU

_BASE = ("top", "token", "second", "rest", "moment")

_SAMPLE = ("noisy_top", "sample", "sample_logit")


class VocabStats(struct.PyTreeNode):
    """What a model says about M positions. All float32 (float64 of float64 models) unless said.

    Attributes:
      token: [M] int32. Arg-max; the lowest id on ties.
      log_prob: [M]. Its log-probability, accurate also when it is nearly 0.
      second_log_prob: [M]. The runner-up's log-probability.
      entropy: [M]. In nats.
      logsumexp: [M]. Of the logits.
      sample: [M] int32, or None without noise. Drawn from softmax(z / temperature).
      sample_log_prob: [M] or None. Log-probability of the sample under softmax(z): *without*
        temperature.
      top_tokens: [M, k] int32, or None if k = 0. The k most probable ids, best first.
      top_log_probs: [M, k] or None.
      given_log_probs: [M, n] or None. Log-probabilities of `given_ids`.
    """

    token: jax.Array
    log_prob: jax.Array
    second_log_prob: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array
    sample: jax.Array | None = None
    sample_log_prob: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_log_probs: jax.Array | None = None
    given_log_probs: jax.Array | None = None


def summarize(z: jax.Array, ids: jax.Array, axis: int = 1) -> Summary:
    """What a tile of logits contributes to the statistics; shared with the accelerator kernels.

    Args:
      z: [M, n] float32. Logits; -inf where an id is banned or does not exist.
      ids: [1, n] int32. Their vocabulary ids, ascending.
      axis: that of the ids; with 0 all arrays are turned: z is [n, M].

    Returns:
      Columns [M, 1]: top, token, second, rest, moment.
    """
    top = z.max(axis=axis, keepdims=True)
    token = jnp.where(z == top, ids, NO_ID).min(axis=axis, keepdims=True)
    is_top = ids == token
    # A tile may be banned as a whole: then top is -inf and it must contribute nothing.
    gap = jnp.where(z > -jnp.inf, z - jnp.where(top > -jnp.inf, top, 0.0), -jnp.inf)
    weight = jnp.where(is_top, 0.0, jnp.exp(gap))
    return {
        "top": top,
        "token": token,
        "second": jnp.where(is_top, -jnp.inf, z).max(axis=axis, keepdims=True),
        "rest": weight.sum(axis=axis, keepdims=True),
        "moment": jnp.where(weight > 0, weight * gap, 0.0).sum(axis=axis, keepdims=True),
    }


def summarize_sample(z: jax.Array, ids: jax.Array, gumbel: jax.Array) -> Summary:
    """The Gumbel-max sample of a tile: columns [M, 1] noisy_top, sample, sample_logit.

    Args:
      z: [M, n] float32, ids: [1, n] int32; as for `summarize`.
      gumbel: [M, n] float32. Noise, times temperature.
    """
    noisy = z + gumbel
    noisy_top = noisy.max(axis=1, keepdims=True)
    sample = jnp.where(noisy == noisy_top, ids, NO_ID).min(axis=1, keepdims=True)
    return {
        "noisy_top": noisy_top,
        "sample": sample,
        "sample_logit": jnp.where(ids == sample, z, -jnp.inf).max(axis=1, keepdims=True),
    }


def merge(a: Summary, b: Summary) -> Summary:
    """Combines the summaries of two disjoint sets of ids, the lower ids in `a`. Exact."""
    b_wins = b["top"] > a["top"]  # a keeps ties: its ids are lower
    high = {name: jnp.where(b_wins, b[name], a[name]) for name in _BASE}
    low = {name: jnp.where(b_wins, a[name], b[name]) for name in _BASE}
    shift = jnp.where(low["top"] > -jnp.inf, low["top"] - high["top"], -jnp.inf)  # <= 0
    scale = jnp.exp(shift)
    shifted = jnp.where(scale > 0, shift, 0.0)
    merged = {
        "top": high["top"],
        "token": high["token"],
        "second": jnp.maximum(high["second"], low["top"]),
        "rest": high["rest"] + scale * (1 + low["rest"]),
        "moment": high["moment"] + scale * (low["moment"] + shifted * (1 + low["rest"])),
    }
    if "sample" in a:
        b_wins = b["noisy_top"] > a["noisy_top"]
        for name in _SAMPLE:
            merged[name] = jnp.where(b_wins, b[name], a[name])
    if "top_tokens" in a:
        tokens = jnp.concatenate([a["top_tokens"], b["top_tokens"]], axis=-1)
        values = jnp.concatenate([a["top_logits"], b["top_logits"]], axis=-1)
        merged["top_logits"], columns = jax.lax.top_k(values, a["top_tokens"].shape[-1])
        merged["top_tokens"] = jnp.take_along_axis(tokens, columns, axis=-1)
    if "given_logits" in a:
        merged["given_logits"] = jnp.maximum(a["given_logits"], b["given_logits"])
    return merged


def tile_summary(
    z: jax.Array,
    ids: jax.Array,
    noise: Noise | None,
    k: int,
    given_ids: jax.Array | None,
) -> Summary:
    """Everything a tile of logits z [M, n] of ids [n] contributes: `merge`'s columns."""
    by_row = functools.partial(summarize, z, ids[None])
    if z.dtype == jnp.float32 and SEVERAL <= z.shape[0] <= MOST_ROWS:
        summary = jax.lax.platform_dependent(cpu=lambda: _across_rows(z, ids), default=by_row)
    else:
        summary = by_row()
    if noise is not None:
        gumbel = noise.temperature * gumbel_noise(noise.key, ids)
        summary |= summarize_sample(z, ids[None], gumbel)
    if k:
        values, columns = jax.lax.top_k(z, min(k, z.shape[1]))
        missing = ((0, 0), (0, k - values.shape[1]))  # of a tile, or a share, of fewer tokens
        summary["top_logits"] = jnp.pad(values, missing, constant_values=-jnp.inf)
        summary["top_tokens"] = jnp.pad(ids[columns].astype(jnp.int32), missing)
    if given_ids is not None:
        column = given_ids - ids[0]
        inside = (column >= 0) & (column < ids.shape[0])
        column = jnp.clip(column, 0, ids.shape[0] - 1)
        logit = jnp.take_along_axis(z, column, axis=-1)
        summary["given_logits"] = jnp.where(inside, logit, -jnp.inf)
    return summary


def _across_rows(z: jax.Array, ids: jax.Array) -> Summary:
    """As `summarize`, as CPUs do it best with a few rows, which `times_rows_of` leaves turned.

    They go through an id of all rows at once, and not through all ids of a row one by one.
    """
    return {name: column.T for name, column in summarize(z.T, ids[:, None], axis=0).items()}


def finish(summary: Summary) -> VocabStats:
    top, rest = summary["top"], summary["rest"]
    log_prob = -jnp.log1p(rest)
    stats = VocabStats(
        token=summary["token"][:, 0],
        log_prob=log_prob[:, 0],
        second_log_prob=(summary["second"] - top + log_prob)[:, 0],
        entropy=(jnp.log1p(rest) - summary["moment"] / (1 + rest))[:, 0],
        logsumexp=(top + jnp.log1p(rest))[:, 0],
    )
    if "sample" in summary:
        # Equal ids give exactly `log_prob`; no subtraction, so no loss near certainty.
        sample_log_prob = summary["sample_logit"] - top + log_prob
        stats = stats.replace(sample=summary["sample"][:, 0], sample_log_prob=sample_log_prob[:, 0])
    if "top_tokens" in summary:
        log_probs = summary["top_logits"] - top + log_prob
        stats = stats.replace(top_tokens=summary["top_tokens"], top_log_probs=log_probs)
    if "given_logits" in summary:
        log_probs = summary["given_logits"] - top + log_prob
        stats = stats.replace(given_log_probs=log_probs)
    return stats


def ban(z: jax.Array, ids: jax.Array, banned_ids: jax.Array | None) -> jax.Array:
    if banned_ids is None:
        return z
    is_banned = (ids[:, None] == banned_ids[None]).any(axis=1)
    return jnp.where(is_banned[None], -jnp.inf, z)
