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

from kernels_pallas.dispatch import choose
from kernels_pallas.unembed_stats import gpu, tpu
from kernels_pallas.unembed_stats.noise import Noise
from kernels_pallas.unembed_stats.reference import unembed_stats_reference
from kernels_pallas.unembed_stats.summary import VocabStats, ban, finish, merge, tile_summary
from kernels_pallas.unembed_stats.xla import matmul, summarize_xla

Implementation = Literal["xla", "tpu", "gpu", "reference"]


def unembed_stats(
    hidden: jax.Array,
    head: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
    vocab_axis: str | tuple[str, ...] | None = None,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> VocabStats:
    """Statistics of softmax(hidden @ head.T) per row.

    Without a cap logits are linear in `hidden`, so whatever is linear in logits is done there by
    the caller: a tempered distribution is `hidden / temperature`, classifier-free guidance a mix of
    two hidden states.

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
      cap: logits z become cap tanh(z / cap); None: they do not.
      implementation: "xla", "tpu", "gpu" (Hopper) or "reference"; None: the best one where it is
        compiled.

    Raises:
      ValueError: if `hidden` and `head` do not fit.
      NotImplementedError: if the named implementation does not exist here.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(f"hidden {hidden.shape} must be [M, D] and head {head.shape} [V, D]")
    if implementation == "reference":
        if vocab_axis is not None:
            raise NotImplementedError("implementation='reference' takes no vocab_axis")
        return unembed_stats_reference(hidden, head, banned_ids, noise, k, given_ids, cap)
    first_id = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * head.shape[0]
    summarize_head = choose(
        "unembed_stats",
        implementation,
        xla=functools.partial(summarize_xla, k=k, cap=cap),
        reference=unembed_stats_reference,
        kernels={
            "tpu": (
                functools.partial(tpu.summarize_tpu, k=k, cap=cap),
                tpu.refusal(head, k, given_ids),
            ),
            "gpu": (
                functools.partial(gpu.summarize_gpu, k=k),
                gpu.refusal(head, k, given_ids, banned_ids, cap),
            ),
        },
    )
    summary = summarize_head(hidden, head, first_id, banned_ids, noise, given_ids)
    if vocab_axis is not None:
        shares = jax.lax.all_gather(summary, vocab_axis)  # [devices, M, ...]
        parts = [jax.tree.map(lambda x, i=i: x[i], shares) for i in range(len(shares["top"]))]
        summary = functools.reduce(merge, parts)
    return finish(summary)


def unembed_logits(
    hidden: jax.Array,
    head: jax.Array,
    banned_ids: jax.Array | None = None,
    *,
    cap: float | None = None,
) -> jax.Array:
    """[M, V] float32 logits, with -inf at banned ids: for those who must see them all."""
    return ban(matmul(hidden, head, cap), jnp.arange(head.shape[0]), banned_ids)


def logits_stats(
    logits: jax.Array,
    *,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """The same statistics from [M, V] float32 logits that are there anyway; -inf: banned."""
    summary = tile_summary(logits, jnp.arange(logits.shape[1]), noise, k, given_ids)
    return finish(summary)
