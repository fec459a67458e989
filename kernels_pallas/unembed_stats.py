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

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from kernels_pallas.dispatch import choose

Implementation = Literal["xla", "tpu", "gpu", "reference"]

Summary = dict[str, jax.Array]  # columns of numbers per row, see `merge`

# Of the XLA implementation. CPUs and GPUs copy a tile's weights out of the head first, which costs
# more than the product itself where there are few rows: then there are no tiles.
WHOLE_LOGITS = 2**23  # up to so many float32 logits are kept at once
VOCAB_TILE = 16384  # else, most vocabulary entries per pass,
TILE_LOGITS = 2**25  # and most logits that it keeps at a time, as long as a tile has 1,024 entries


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


def unembed_stats(
    hidden: jax.Array,
    head: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
    vocab_axis: str | tuple[str, ...] | None = None,
    implementation: Implementation | None = None,
) -> VocabStats:
    """Statistics of softmax(hidden @ head.T) per row.

    Logits are linear in `hidden`, so whatever is linear in logits is done there by the caller: a
    tempered law is `hidden / temperature`, classifier-free guidance a mix of two hidden states.

    Args:
      hidden: [M, D]. Final (normalised) hidden states; float32 or the head's dtype.
      head: [V, D]. The output head, a row per token.
      banned_ids: [n] int32. Ids whose probability is zero; the rest is renormalised. Negative
        entries ban nothing.
      noise: draws a sample per row if given.
      k: how many most probable ids to return; 0: none.
      given_ids: [M, n] int32. Ids whose log-probabilities are wanted.
      vocab_axis: inside `jax.shard_map`: the mesh axis over which the vocabulary is split, in
        order; `head` is then one device's share. Ids are global, and the shares' summaries are
        merged exactly: a few numbers per row cross the network.
      implementation: "xla", "tpu", "gpu" (Hopper) or "reference"; None: the best one where it is
        compiled.

    Raises:
      ValueError: if `hidden` and `head` do not fit.
      NotImplementedError: if the named implementation does not exist here.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {hidden.shape} must be [M, D] and head {head.shape} [V, D]")
    from kernels_pallas import unembed_stats_gpu as gpu  # they build on this module
    from kernels_pallas import unembed_stats_tpu as tpu

    if implementation == "reference":
        if vocab_axis is not None:
            raise NotImplementedError("implementation='reference' takes no vocab_axis")
        return unembed_stats_reference(hidden, head, banned_ids, noise, k, given_ids)
    first_id = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * head.shape[0]
    summarize_head = choose(
        "unembed_stats",
        implementation,
        xla=functools.partial(_summarize_xla, k=k),
        reference=unembed_stats_reference,
        kernels={
            "tpu": (functools.partial(tpu.summarize_tpu, k=k), tpu.refusal(head, k, given_ids)),
            "gpu": (
                functools.partial(gpu.summarize_gpu, k=k),
                gpu.refusal(head, k, given_ids, banned_ids),
            ),
        },
    )
    summary = summarize_head(hidden, head, first_id, banned_ids, noise, given_ids)
    if vocab_axis is not None:
        shares = jax.lax.all_gather(summary, vocab_axis)  # [devices, M, ...]
        parts = [jax.tree.map(lambda x, i=i: x[i], shares) for i in range(len(shares["top"]))]
        summary = functools.reduce(merge, parts)
    return _finish(summary)


def unembed_logits(
    hidden: jax.Array, head: jax.Array, banned_ids: jax.Array | None = None
) -> jax.Array:
    """[M, V] float32 logits, with -inf at banned ids: for those who must see them all."""
    return _ban(_matmul(hidden, head), jnp.arange(head.shape[0]), banned_ids)


def logits_stats(
    logits: jax.Array,
    *,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """The same statistics from [M, V] float32 logits that are there anyway; -inf: banned."""
    summary = _tile_summary(logits, jnp.arange(logits.shape[1]), noise, k, given_ids)
    return _finish(summary)


def unembed_stats_reference(
    hidden: jax.Array,
    head: jax.Array,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """The contract in float32 with all logits in memory. Args: as `unembed_stats`."""
    z = hidden.astype(jnp.float32) @ head.astype(jnp.float32).T  # [M, V]
    z = _ban(z, jnp.arange(head.shape[0]), banned_ids)
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


def _summarize_xla(
    hidden: jax.Array,
    head: jax.Array,
    first_id: jax.Array | int,
    banned_ids: jax.Array | None,
    noise: Noise | None,
    given_ids: jax.Array | None,
    *,
    k: int,
) -> Summary:
    """Tiles of the vocabulary, merged one after the other; `first_id` is that of head's first row.

    Keeps [M, tile] float32 logits at a time, see `tile_len`.
    """
    V = head.shape[0]
    size = tile_len(hidden.shape[0], V)
    if size == V:
        ids = first_id + jnp.arange(V, dtype=jnp.int32)
        return _tile_summary(_ban(_matmul(hidden, head), ids, banned_ids), ids, noise, k, given_ids)

    num_tiles = -(-V // size)

    def tile(i: jax.Array | int) -> Summary:
        # The last tile starts early enough to be whole, and skips what was seen already.
        start = jnp.minimum(i * size, V - size).astype(jnp.int32)
        row = start + jnp.arange(size, dtype=jnp.int32)
        z = _matmul(hidden, jax.lax.dynamic_slice_in_dim(head, start, size))
        z = jnp.where((row >= i * size)[None], z, -jnp.inf)
        ids = first_id + row
        return _tile_summary(_ban(z, ids, banned_ids), ids, noise, k, given_ids)

    return jax.lax.fori_loop(1, num_tiles, lambda i, summary: merge(summary, tile(i)), tile(0))


def tile_len(M: int, V: int) -> int:
    """How many vocabulary entries the XLA passes over [M, V] logits take at a time."""
    if M * V <= WHOLE_LOGITS:
        return V
    return min(V, VOCAB_TILE, max(1024, TILE_LOGITS // M))


def _matmul(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[M, V] float32 of hidden [M, D] and head [V, D]."""
    return jax.lax.dot_general(
        hidden.astype(head.dtype),
        head,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.promote_types(head.dtype, jnp.float32),
    )


def _ban(z: jax.Array, ids: jax.Array, banned_ids: jax.Array | None) -> jax.Array:
    if banned_ids is None:
        return z
    is_banned = (ids[:, None] == banned_ids[None]).any(axis=1)
    return jnp.where(is_banned[None], -jnp.inf, z)


def summarize(z: jax.Array, ids: jax.Array) -> Summary:
    """What a tile of logits contributes to the statistics; shared with the accelerator kernels.

    Args:
      z: [M, n] float32. Logits; -inf where an id is banned or does not exist.
      ids: [1, n] int32. Their vocabulary ids, ascending.

    Returns:
      Columns [M, 1]: top, token, second, rest, moment.
    """
    top = z.max(axis=1, keepdims=True)
    token = jnp.where(z == top, ids, NO_ID).min(axis=1, keepdims=True)
    is_top = ids == token
    # A tile may be banned as a whole: then top is -inf and it must contribute nothing.
    gap = jnp.where(z > -jnp.inf, z - jnp.where(top > -jnp.inf, top, 0.0), -jnp.inf)
    weight = jnp.where(is_top, 0.0, jnp.exp(gap))
    return {
        "top": top,
        "token": token,
        "second": jnp.where(is_top, -jnp.inf, z).max(axis=1, keepdims=True),
        "rest": weight.sum(axis=1, keepdims=True),
        "moment": jnp.where(weight > 0, weight * gap, 0.0).sum(axis=1, keepdims=True),
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


NO_ID = 2**31 - 1


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


_BASE = ("top", "token", "second", "rest", "moment")
_SAMPLE = ("noisy_top", "sample", "sample_logit")


def _tile_summary(
    z: jax.Array,
    ids: jax.Array,
    noise: Noise | None,
    k: int,
    given_ids: jax.Array | None,
) -> Summary:
    """Everything a tile of logits z [M, n] of ids [n] contributes: `merge`'s columns."""
    summary = summarize(z, ids[None])
    if noise is not None:
        gumbel = noise.temperature * gumbel_noise(noise.key, ids)
        summary |= summarize_sample(z, ids[None], gumbel)
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


def _finish(summary: Summary) -> VocabStats:
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


def gumbel_noise(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise for given vocabulary ids, from 64 random bits each.

    -log(-log u) in float32 with a 24-bit u cuts the tail that wins arg-maxes over large
    vocabularies, and so samples at too low a temperature (Zheng et al., "Masked Diffusion Models
    are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling",
    arXiv:2409.02908). Here w = 1 - u is built from two 32-bit words, so it keeps full relative
    precision down to 2^-64, and -log u = -log1p(-w).

    Args:
      key: [M, 2] uint32. A stream per row.
      ids: [n] or [1, n] int. Vocabulary ids.

    Returns:
      [M, n] float32; a function of (key row, id) alone.
    """
    counter = ids.astype(jnp.uint32).reshape(1, -1)
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
