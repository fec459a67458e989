"""Reading and scoring the vocabulary: what hidden states say about the tokens that come.

Everything here takes the output head, which is a model's (`head`) or a draft head's own matrix.
Output i is about token i, or about token i + 1 if `cfg.shifted_logits`.

Letters: M rows, D model width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
from flax import struct
from jax.sharding import PartitionSpec as P

from dlm.params import Params
from dlm.sharding import per_shard, split_axes
from kernels_pallas.unembed_loss import TargetStats, unembed_loss
from kernels_pallas.unembed_stats import Noise, VocabStats, unembed_logits, unembed_stats


class CappedHead(struct.PyTreeNode):
    """An output head whose logits z go through cap tanh(z / cap).

    Attributes:
      weight: [V, D].
      cap: > 0. Static.
    """

    weight: jax.Array
    cap: float = struct.field(pytree_node=False)

    def __getitem__(self, ids: jax.Array) -> CappedHead:
        """The head of some tokens only."""
        return self.replace(weight=self.weight[ids])


Head = jax.Array | CappedHead


def head(params: Params) -> Head:
    """A model's output head, [V, D] unless its logits are capped."""
    weight, capped = head_weight(params), params.get("logit_cap")
    return weight if capped is None else CappedHead(weight, capped.cap)


def head_weight(params: Params) -> jax.Array:
    """[V, D]: its matrix; tied models share the embedding."""
    weight: jax.Array = params["unembed"] if "unembed" in params else params["embed"]
    return weight


def _parts(head: Head) -> tuple[jax.Array, float | None]:
    return (head.weight, head.cap) if isinstance(head, CappedHead) else (head, None)


def logits(head: Head, hidden: jax.Array, *, banned_ids: jax.Array | None = None) -> jax.Array:
    """All logits at once, for those who must see them all.

    Args:
      head: of a model, or [V, D].
      hidden: [..., D]. Final hidden states.
      banned_ids: [n] int32. Tokens that get -inf; None: none.

    Returns:
      [..., V] float32.
    """
    weight, cap = _parts(head)
    flat = unembed_logits(hidden.reshape(-1, hidden.shape[-1]), weight, banned_ids, cap=cap)
    return flat.reshape(*hidden.shape[:-1], -1)


def read(
    head: Head,
    hidden: jax.Array,
    *,
    banned_ids: jax.Array | None = None,
    noise: Noise | None = None,
    k: int = 0,
    given_ids: jax.Array | None = None,
) -> VocabStats:
    """`unembed_stats`, each device reading its share of the vocabulary; no logits are stored.

    Args:
      head: of a model, or [V, D].
      hidden: [..., D]. Final hidden states.
      banned_ids: [n] int32. Tokens that cannot come; None: none.
      noise: what samples are drawn with, a key [..., 2] per hidden state; None: there are none.
      k: how many of the most probable tokens to name.
      given_ids: [..., n] int32. Tokens whose log-probabilities are wanted; None: of none.

    Returns:
      Statistics, each [...] or [..., n].
    """
    weight, cap = _parts(head)
    lead = hidden.shape[:-1]
    rows = lambda x: x.reshape(-1, x.shape[-1]) if x.ndim else x  # noqa: E731
    operands = {
        "hidden": rows(hidden),
        "head": weight,
        "banned_ids": banned_ids,
        "noise": jax.tree.map(rows, noise),
        "given_ids": None if given_ids is None else rows(given_ids),
    }
    split = split_axes(batch=operands["hidden"].shape[0], vocab=weight.shape[0])
    by_row, vocab = P(split["batch"]), split["vocab"]
    specs = {
        "hidden": by_row,
        "head": P(vocab),
        "banned_ids": P(),
        "given_ids": by_row,
        "noise": jax.tree.map(lambda x: by_row if x.ndim else P(), noise),
    }
    run = functools.partial(unembed_stats, k=k, vocab_axis=vocab, cap=cap)
    stats: VocabStats = per_shard(run, operands, specs, by_row)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), stats)


def score(head: Head, hidden: jax.Array, targets: jax.Array) -> TargetStats:
    """What hidden states say about the right tokens; differentiable, see `unembed_loss`.

    Args:
      head: of a model, or [V, D].
      hidden: [..., D]. Final hidden states.
      targets: [...] int32. The token that each of them should predict.

    Returns:
      Statistics of shape [...].
    """
    weight, cap = _parts(head)
    rows = hidden.reshape(-1, hidden.shape[-1])
    split = split_axes(batch=rows.shape[0], vocab=weight.shape[0])
    batch, vocab = P(split["batch"]), split["vocab"]
    out = per_shard(
        functools.partial(unembed_loss, vocab_axis=vocab, cap=cap),
        {"hidden": rows, "head": weight, "targets": targets.reshape(-1)},
        {"hidden": batch, "head": P(vocab), "targets": batch},
        batch,
    )
    return jax.tree.map(lambda x: x.reshape(targets.shape), out)
