"""Reading and scoring the vocabulary: what hidden states say about the tokens that come.

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


def output_head(params: Params) -> jax.Array:
    """[V, D]. Logits are hidden states times its transpose; tied models share the embedding."""
    return params["unembed"] if "unembed" in params else params["embed"]


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """[..., V] float32 logits of hidden states [..., D].

    Output i is about token i, or about token i + 1 if `cfg.shifted_logits`.
    """
    flat = unembed_logits(hidden.reshape(-1, hidden.shape[-1]), output_head(params))
    return flat.reshape(*hidden.shape[:-1], -1)


def vocab_stats(
    params: Params,
    hidden: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """`unembed_stats` of hidden states [M, D], each device reading its share of the vocabulary."""
    head = output_head(params)
    split = split_axes(batch=hidden.shape[0], vocab=head.shape[0])
    rows, vocab = P(split["batch"]), split["vocab"]
    operands = {
        "hidden": hidden,
        "head": head,
        "banned_ids": banned_ids,
        "noise": noise,
        "given_ids": given_ids,
    }
    specs = {
        "hidden": rows,
        "head": P(vocab),
        "banned_ids": P(),
        "given_ids": rows,
        "noise": jax.tree.map(lambda x: rows if x.ndim else P(), noise),
    }
    return per_shard(functools.partial(unembed_stats, k=k, vocab_axis=vocab), operands, specs, rows)


def target_stats(params: Params, hidden: jax.Array, targets: jax.Array) -> TargetStats:
    """What the model says about the right tokens; differentiable, see `unembed_loss`.

    Args:
      params: the model's.
      hidden: [..., D]. Final hidden states.
      targets: [...] int32. The token that each of them should predict.

    Returns:
      Statistics of shape [...].
    """
    head, rows = output_head(params), hidden.reshape(-1, hidden.shape[-1])
    split = split_axes(batch=rows.shape[0], vocab=head.shape[0])
    batch, vocab = P(split["batch"]), split["vocab"]
    out = per_shard(
        functools.partial(unembed_loss, vocab_axis=vocab),
        {"hidden": rows, "head": head, "targets": targets.reshape(-1)},
        {"hidden": batch, "head": P(vocab), "targets": batch},
        batch,
    )
    return jax.tree.map(lambda x: x.reshape(targets.shape), out)
