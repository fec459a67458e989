"""Reading and scoring the vocabulary: what hidden states say about the tokens that come.

Everything here takes the output head, which is a model's (`head`) or a draft head's own. Output i
is about token i, or about token i + 1 if `cfg.shifted_logits`.

Letters: M rows, D model width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
from jax.sharding import PartitionSpec as P

from dlm.params import Params
from dlm.sharding import per_shard, split_axes
from kernels_pallas.unembed_loss import TargetStats, unembed_loss
from kernels_pallas.unembed_stats import Noise, VocabStats, unembed_logits, unembed_stats


def head(params: Params) -> jax.Array:
    """A model's output head [V, D]; tied models share the embedding."""
    return params["unembed"] if "unembed" in params else params["embed"]


def logits(head: jax.Array, hidden: jax.Array, *, banned_ids: jax.Array | None = None) -> jax.Array:
    """All logits at once, for those who must see them all.

    Args:
      head: [V, D].
      hidden: [..., D]. Final hidden states.
      banned_ids: [n] int32. Tokens that get -inf; None: none.

    Returns:
      [..., V] float32.
    """
    flat = unembed_logits(hidden.reshape(-1, hidden.shape[-1]), head, banned_ids)
    return flat.reshape(*hidden.shape[:-1], -1)


def read(
    head: jax.Array,
    hidden: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """`unembed_stats`, each device reading its share of the vocabulary; no logits are stored.

    Args:
      head: [V, D].
      hidden: [..., D]. Final hidden states.
      banned_ids: [n] int32. Tokens that cannot come; None: none.
      noise: what samples are drawn with, a key [..., 2] per hidden state; None: there are none.
      k: how many of the most probable tokens to name.
      given_ids: [..., n] int32. Tokens whose log-probabilities are wanted; None: of none.

    Returns:
      Statistics, each [...] or [..., n].
    """
    lead = hidden.shape[:-1]
    rows = lambda x: x.reshape(-1, x.shape[-1]) if x.ndim else x  # noqa: E731
    operands = {
        "hidden": rows(hidden),
        "head": head,
        "banned_ids": banned_ids,
        "noise": jax.tree.map(rows, noise),
        "given_ids": None if given_ids is None else rows(given_ids),
    }
    split = split_axes(batch=operands["hidden"].shape[0], vocab=head.shape[0])
    by_row, vocab = P(split["batch"]), split["vocab"]
    specs = {
        "hidden": by_row,
        "head": P(vocab),
        "banned_ids": P(),
        "given_ids": by_row,
        "noise": jax.tree.map(lambda x: by_row if x.ndim else P(), noise),
    }
    run = functools.partial(unembed_stats, k=k, vocab_axis=vocab)
    stats: VocabStats = per_shard(run, operands, specs, by_row)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), stats)


def score(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> TargetStats:
    """What hidden states say about the right tokens; differentiable, see `unembed_loss`.

    Args:
      head: [V, D].
      hidden: [..., D]. Final hidden states.
      targets: [...] int32. The token that each of them should predict.

    Returns:
      Statistics of shape [...].
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    split = split_axes(batch=rows.shape[0], vocab=head.shape[0])
    batch, vocab = P(split["batch"]), split["vocab"]
    out = per_shard(
        functools.partial(unembed_loss, vocab_axis=vocab),
        {"hidden": rows, "head": head, "targets": targets.reshape(-1)},
        {"hidden": batch, "head": P(vocab), "targets": batch},
        batch,
    )
    return jax.tree.map(lambda x: x.reshape(targets.shape), out)
