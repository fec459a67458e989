"""Hidden states to vocabulary statistics, without ever storing the logits of all positions.

Letters: M rows (positions), D model width, V vocabulary.

A decoding method rarely needs logits: it needs the arg-max, how sure the model is of it, perhaps
the runner-up, the entropy, or a sample. `unembed_stats` computes these in one pass over tiles of
the vocabulary, keeping a few numbers per row:

  top        max_v z_v                                  token  its id (lowest on ties)
  rest       sum over v != token of exp(z_v - top)      second the second largest logit
  moment     sum over v of exp(z_v - top) (z_v - top)

from which  log p(token) = -log1p(rest)  and  entropy = log1p(rest) - moment / (1 + rest).

Leaving the arg-max out of `rest` keeps full float32 resolution where the model is almost certain:
1 - p = 1e-12 and 1 - p = 1e-9 are both 1.0 as float32 probabilities, yet decoding orders by them.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

Implementation = Literal["xla", "reference"]

VOCAB_TILE = 16384  # vocabulary columns per pass of the XLA implementation


class Noise(struct.PyTreeNode):
    """What makes a sample of softmax(z / temperature) out of an arg-max.

    Attributes:
      key: [M, 2] uint32. One random stream per row; noise depends on it and on the vocabulary id
        only, so it is the same for every tiling, batch and device layout.
      temperature: scalar float32 > 0.
    """

    key: jax.Array
    temperature: jax.Array


class VocabStats(struct.PyTreeNode):
    """What a model says about M positions. All float32 unless said.

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


def unembed_stats(
    hidden: jax.Array,
    head: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> VocabStats:
    """Statistics of softmax(hidden @ head) per row.

    Logits are linear in `hidden`, so whatever is linear in logits is done there by the caller: a
    tempered law is `hidden / temperature`, classifier-free guidance a mix of two hidden states.

    Args:
      hidden: [M, D]. Final (normalised) hidden states; float32 or the head's dtype.
      head: [D, V]. The output head.
      banned_ids: [n] int32. Ids whose probability is zero; the rest is renormalised. Negative
        entries ban nothing.
      noise: draws a sample per row if given.
      k: how many most probable ids to return; 0: none.
      given_ids: [M, n] int32. Ids whose log-probabilities are wanted.
      implementation: "xla" or "reference"; None: the best one here.

    Raises:
      ValueError: if `hidden` and `head` do not fit.
      NotImplementedError: if the named implementation does not exist here.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[0]:
        raise ValueError(f"hidden {hidden.shape} must be [M, D] and head {head.shape} [D, V]")
    if implementation == "reference":
        return unembed_stats_reference(hidden, head, banned_ids, noise, k, given_ids)
    if implementation not in (None, "xla"):
        raise NotImplementedError(
            f"implementation={implementation!r} of unembed_stats does not exist; "
            "use None, 'xla' or 'reference'"
        )
    return _unembed_stats_xla(hidden, head, banned_ids, noise, k, given_ids)


def unembed_logits(
    hidden: jax.Array, head: jax.Array, banned_ids: jax.Array | None = None
) -> jax.Array:
    """[M, V] float32 logits, with -inf at banned ids: for those who must see them all."""
    return _ban(_matmul(hidden, head), jnp.arange(head.shape[1]), banned_ids)


def logits_stats(
    logits: jax.Array,
    *,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """The same statistics from [M, V] float32 logits that are there anyway; -inf: banned."""
    summary = _tile_summary(logits, jnp.arange(logits.shape[1]), noise, k, given_ids)
    return _finish(summary, noise)


def unembed_stats_reference(
    hidden: jax.Array,
    head: jax.Array,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """The contract in float32 with all logits in memory. Args: as `unembed_stats`."""
    z = hidden.astype(jnp.float32) @ head.astype(jnp.float32)  # [M, V]
    z = _ban(z, jnp.arange(head.shape[1]), banned_ids)
    log_probs = jax.nn.log_softmax(z)
    probs = jnp.exp(log_probs)
    token = jnp.argmax(z, axis=-1).astype(jnp.int32)
    is_token = jnp.arange(head.shape[1])[None] == token[:, None]
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
        gumbel = gumbel_noise(noise.key, jnp.arange(head.shape[1]))
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


def _unembed_stats_xla(
    hidden: jax.Array,
    head: jax.Array,
    banned_ids: jax.Array | None,
    noise: Noise | None,
    k: int,
    given_ids: jax.Array | None,
) -> VocabStats:
    """Tiles of the vocabulary, merged one after the other.

    Moves the head once and keeps [M, VOCAB_TILE] float32 logits at a time.
    """
    V = head.shape[1]
    if V <= VOCAB_TILE:
        z = unembed_logits(hidden, head, banned_ids)
        return logits_stats(z, noise=noise, k=k, given_ids=given_ids)

    num_tiles = -(-V // VOCAB_TILE)

    def tile(i: jax.Array | int) -> dict[str, jax.Array]:
        # The last tile starts early enough to be whole, and skips what was seen already.
        start = jnp.minimum(i * VOCAB_TILE, V - VOCAB_TILE)
        ids = start + jnp.arange(VOCAB_TILE)
        z = _matmul(hidden, jax.lax.dynamic_slice_in_dim(head, start, VOCAB_TILE, axis=1))
        z = jnp.where((ids >= i * VOCAB_TILE)[None], _ban(z, ids, banned_ids), -jnp.inf)
        return _tile_summary(z, ids, noise, k, given_ids)

    summary = jax.lax.fori_loop(1, num_tiles, lambda i, summary: _merge(summary, tile(i)), tile(0))
    return _finish(summary, noise)


def _matmul(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jnp.dot(hidden.astype(head.dtype), head, preferred_element_type=jnp.float32)


def _ban(z: jax.Array, ids: jax.Array, banned_ids: jax.Array | None) -> jax.Array:
    if banned_ids is None:
        return z
    is_banned = (ids[:, None] == banned_ids[None]).any(axis=1)
    return jnp.where(is_banned[None], -jnp.inf, z)


def _tile_summary(
    z: jax.Array,
    ids: jax.Array,
    noise: Noise | None,
    k: int,
    given_ids: jax.Array | None,
) -> dict[str, jax.Array]:
    """Everything one vocabulary tile contributes: [M] arrays (top-k and given: [M, k], [M, n])."""
    column = jnp.argmax(z, axis=-1)
    is_top = jnp.arange(z.shape[1])[None] == column[:, None]
    top = z.max(axis=-1)
    # A tile may be banned as a whole: then top is -inf and it must contribute nothing.
    gap = jnp.where(z > -jnp.inf, z - jnp.where(top > -jnp.inf, top, 0.0)[:, None], -jnp.inf)
    weight = jnp.where(is_top, 0.0, jnp.exp(gap))
    summary = {
        "top": top,
        "token": ids[column].astype(jnp.int32),
        "second": jnp.where(is_top, -jnp.inf, z).max(axis=-1),
        "rest": weight.sum(axis=-1),
        "moment": jnp.where(weight > 0, weight * gap, 0.0).sum(axis=-1),
    }
    if noise is not None:
        noisy = z + noise.temperature * gumbel_noise(noise.key, ids)
        column = jnp.argmax(noisy, axis=-1)
        summary["noisy_top"] = noisy.max(axis=-1)
        summary["sample"] = ids[column].astype(jnp.int32)
        summary["sample_logit"] = jnp.take_along_axis(z, column[:, None], axis=-1)[:, 0]
    if k:
        values, columns = jax.lax.top_k(z, min(k, z.shape[1]))
        summary["top_logits"] = values
        summary["top_tokens"] = ids[columns].astype(jnp.int32)
    if given_ids is not None:
        column = given_ids - ids[0]
        inside = (column >= 0) & (column < ids.shape[0])
        column = jnp.clip(column, 0, ids.shape[0] - 1)
        logit = jnp.take_along_axis(z, column, axis=-1)
        summary["given_logits"] = jnp.where(inside, logit, -jnp.inf)
    return summary


def _merge(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Combines the summaries of two disjoint sets of ids, the lower ids in `a`. Exact."""
    b_wins = b["top"] > a["top"]  # a keeps ties: its ids are lower
    high = jax.tree.map(lambda x, y: jnp.where(b_wins, y, x), *_tops(a, b))
    low = jax.tree.map(lambda x, y: jnp.where(b_wins, x, y), *_tops(a, b))
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
        for name in ("noisy_top", "sample", "sample_logit"):
            merged[name] = jnp.where(b_wins, b[name], a[name])
    if "top_tokens" in a:
        tokens = jnp.concatenate([a["top_tokens"], b["top_tokens"]], axis=-1)
        values = jnp.concatenate([a["top_logits"], b["top_logits"]], axis=-1)
        merged["top_logits"], columns = jax.lax.top_k(values, a["top_tokens"].shape[-1])
        merged["top_tokens"] = jnp.take_along_axis(tokens, columns, axis=-1)
    if "given_logits" in a:
        merged["given_logits"] = jnp.maximum(a["given_logits"], b["given_logits"])
    return merged


def _tops(
    a: dict[str, jax.Array], b: dict[str, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    names = ("top", "token", "second", "rest", "moment")
    return {n: a[n] for n in names}, {n: b[n] for n in names}


def _finish(summary: dict[str, jax.Array], noise: Noise | None) -> VocabStats:
    top, rest = summary["top"], summary["rest"]
    log_prob = -jnp.log1p(rest)
    stats = VocabStats(
        token=summary["token"],
        log_prob=log_prob,
        second_log_prob=summary["second"] - top + log_prob,
        entropy=jnp.log1p(rest) - summary["moment"] / (1 + rest),
        logsumexp=top + jnp.log1p(rest),
    )
    if noise is not None:
        # Equal ids give exactly `log_prob`; no subtraction, so no loss near certainty.
        sample_log_prob = summary["sample_logit"] - top + log_prob
        stats = stats.replace(sample=summary["sample"], sample_log_prob=sample_log_prob)
    if "top_tokens" in summary:
        log_probs = summary["top_logits"] - top[:, None] + log_prob[:, None]
        stats = stats.replace(top_tokens=summary["top_tokens"], top_log_probs=log_probs)
    if "given_logits" in summary:
        log_probs = summary["given_logits"] - top[:, None] + log_prob[:, None]
        stats = stats.replace(given_log_probs=log_probs)
    return stats


def gumbel_noise(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise for given vocabulary ids, from 64 random bits each.

    -log(-log u) in float32 with a 24-bit u cuts the tail that wins arg-maxes over large
    vocabularies, and so samples at too low a temperature (Zheng et al., "Masked Diffusion Models
    are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling",
    arXiv:2409.02908). Here w = 1 - u is built from two 32-bit words, so it keeps full relative
    precision down to 2^-64, and -log u = -log1p(-w).

    Args:
      key: [M, 2] uint32. A stream per row.
      ids: [n] int. Vocabulary ids.

    Returns:
      [M, n] float32; a function of (key row, id) alone.
    """
    counter = ids.astype(jnp.uint32)[None, :]
    high, low = threefry2x32(key[:, :1], key[:, 1:], counter, jnp.zeros_like(counter))
    w = high.astype(jnp.float32) * 2.0**-32 + (low.astype(jnp.float32) + 0.5) * 2.0**-64
    exponential = -jnp.log1p(-jnp.minimum(w, 1 - 2.0**-24))
    return -jnp.log(exponential)


def threefry2x32(
    key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds: two random uint32 words per (key, counter), elementwise.

    Written out, rather than taken from `jax.random`, so that a tile of noise can be drawn inside
    any kernel. Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for r in rotations[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << jnp.uint32(r)) | (x1 >> jnp.uint32(32 - r))
            x1 = x1 ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
