"""Masks learn what a model says of the tokens to come, in the forward in which it says it.

References: An et al., "PARD", arXiv:2504.18583, Sec. 3, and the public code (sets of masks, and
which are dropped); Samragh et al., arXiv:2507.11851 (a change that masks alone see); the masks are
`dlm.heads.masks`. Behind positions s of a text, drawn anew in every step, stand masks g = 1 .. J,
whose row q_g learns what the row of token s + g says of the token behind it, p:

    loss = sum_g decay^(g - 1)  mean over s of  KL(p(x_{s+g+1} | x_{<= s+g}) || q_g(. | x_{<= s}))

over tokens of completions up to their first EOS. Tokens see no mask, so the text is read first,
and masks go behind its keys and values: they alone have a backward pass. (PARD learns the text.)
Of N positions only

    n_g = floor(N max(keep^g, least))

have a g-th mask, drawn among those that have one before it (conditional drop): contexts stay those
of drafts, and of seven masks per position 2.4 are read. Where masks guess a part of the vocabulary,
p is restricted to it, and tokens count that are in it.

Letters: B batch, T positions of the text, R masks of a row, J groups, N positions before tokens
that may count, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm import vocab
from dlm.cache import init_stacked
from dlm.config import ModelConfig
from dlm.heads.masks import MaskHeads, MaskNetwork, sees
from dlm.models import decoder
from dlm.params import Params
from dlm.trainable import Learned
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask
from train.losses import draft_metrics, in_chunks
from train.objectives import Context, Objective
from train.reading import scored_tokens


class MaskRows(struct.PyTreeNode):
    """Masks behind positions of a text: group by group, each about the first ones of the last.

    Attributes:
      last: [B, R] int32. s, the index of the last token that a mask sees.
      is_scored: [B, R] bool. Whether the token behind it counts.
      sizes: n_g, of every group. Static.
    """

    last: jax.Array
    is_scored: jax.Array
    sizes: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def group(self) -> jax.Array:
        """[B, R] int32: g, from 1."""
        groups = np.repeat(np.arange(1, len(self.sizes) + 1), self.sizes)
        return jnp.broadcast_to(jnp.asarray(groups)[None], self.last.shape)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """[B, R] as [B, n_g] of every group."""
        return jnp.split(x, np.cumsum(self.sizes)[:-1], axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MasksLoss(Objective):
    """Goes with `dlm.heads.masks:MaskHeads` as `train.trainable`.

    Attributes:
      keep: in (0, 1], of the masks of a group those that the next one has too (PARD: 0.7).
      least: in [0, 1], of all positions those that every group has at least (PARD: 0.2).
      decay: > 0; of the weight from group to group.
      on_prompt: whether tokens of the prompt are learned too.
      remat: whether the backward pass recomputes each layer.
    """

    goes_with = MaskHeads

    keep: float = 0.7
    least: float = 0.2
    decay: float = 0.8
    on_prompt: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be in (0, 1]")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least={self.least} must be in [0, 1]")
        if not self.decay > 0:
            raise ValueError(f"decay={self.decay} must be positive")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` are masks.

        Returns:
          Scalar float32, and metrics: "loss", and those of `train.losses.draft_metrics`, a root per
          set that has lost no mask.
        """
        network: MaskNetwork = learned.own
        target, start = learned.target, batch["prompt_start"]
        tokens = jnp.concatenate([batch["prompt"], batch["completion"]], axis=1)
        T = tokens.shape[1]
        N = T if self.on_prompt else batch["completion"].shape[1]
        sizes = self.sizes(N, network.num_masks)
        masks = draw_masks(context.key, scored_tokens(batch, self.on_prompt), start, sizes)
        of_text, ours = read_masks(network, target, cfg, tokens, start, masks, self.remat)
        place = jnp.minimum(masks.last + masks.group, T - 1)
        theirs = jnp.take_along_axis(of_text, place[..., None], axis=1)
        head = network.head(target)

        def one_chunk(ours: jax.Array, theirs: jax.Array) -> tuple[jax.Array, jax.Array]:
            log_q, log_p = (jax.nn.log_softmax(vocab.logits(head, x)) for x in (ours, theirs))
            divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            return divergence, jnp.argmax(log_q, axis=-1).astype(jnp.int32)

        each, token = in_chunks(one_chunk, ours, theirs)
        right = jnp.take_along_axis(tokens, jnp.minimum(place + 1, T - 1), axis=1)
        is_learned = masks.is_scored
        if (ids := network.ids) is not None:
            token = ids[token]
            is_learned &= jnp.zeros(cfg.vocab_size, bool).at[ids].set(True)[right]
        groups = zip(
            *map(masks.split, (each, is_learned, token == right, masks.is_scored)), strict=True
        )
        total, drafts = jnp.float32(0), []
        whole = masks.sizes[-1]  # sets that have lost no mask
        for g, (divergence, learned_here, is_right, is_scored) in enumerate(groups):
            num = jnp.maximum(learned_here.sum(), 1)
            total += self.decay**g * jnp.where(learned_here, divergence, 0.0).sum() / num
            drafts.append((is_right[:, :whole], is_scored[:, :whole]))
        return total, {"loss": total, **draft_metrics(drafts)}

    def sizes(self, num_positions: int, num_masks: int) -> tuple[int, ...]:
        """n_g of J = `num_masks` groups, at least 1, of N = `num_positions`."""
        shares = (max(self.keep**g, self.least) for g in range(1, num_masks + 1))
        return tuple(max(1, int(num_positions * share)) for share in shares)


def draw_masks(
    key: jax.Array, is_scored: jax.Array, start: jax.Array, sizes: tuple[int, ...]
) -> MaskRows:
    """Masks behind positions whose second next token counts; where those do not suffice, others.

    Args:
      key: of this step.
      is_scored: [B, T] bool. Tokens that count.
      start: [B] int32. The first real position.
      sizes: n_g, of every group, none larger than the one before.
    """
    (B, T), J = is_scored.shape, len(sizes)
    may_begin = jnp.pad(is_scored[:, 2:], ((0, 0), (0, 2)))
    may_begin &= jnp.arange(T)[None] >= start[:, None]
    order = jax.random.uniform(key, (B, T)) + may_begin
    found, last = jax.lax.top_k(order, sizes[0])
    counts = jnp.pad(is_scored, ((0, 0), (0, J + 1)))
    of_group = [
        (found[:, :n] >= 1) & jnp.take_along_axis(counts, last[:, :n] + g + 1, axis=1)
        for g, n in enumerate(sizes, start=1)
    ]
    return MaskRows(
        last=jnp.concatenate([last[:, :n] for n in sizes], axis=1),
        is_scored=jnp.concatenate(of_group, axis=1),
        sizes=sizes,
    )


def read_masks(
    network: MaskNetwork,
    target: Params,
    cfg: ModelConfig,
    tokens: jax.Array,
    start: jax.Array,
    masks: MaskRows,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Final states [B, T, D] of texts, through which no gradient flows, and [B, R, D] of masks.

    Args:
      network: what the masks are.
      target, cfg: the model.
      tokens: [B, T] int32. Left-padded texts.
      start: [B] int32. The first real position.
      masks: R of them.
      remat: whether the backward pass computes layers again.
    """
    B, T = tokens.shape
    positions = jnp.maximum(masks.last + masks.group - start[:, None], 0)
    length = jnp.maximum(T - start, positions.max(axis=1) + 1)
    empty = Slots(init_stacked(cfg, B, T), write_at=jnp.zeros_like(start), length=length)
    whole = Window.left_padded(tokens, start, is_causal=True)
    text = decoder.forward(target, cfg, whole, empty)
    of_text, cache = jax.lax.stop_gradient((text.hidden, text.cache))
    assert cache is not None
    first = jnp.broadcast_to(start[:, None], masks.last.shape)
    slots = Slots(cache, jnp.stack([first, masks.last + 1], axis=-1)[:, :, None], length=length)
    window = Window(
        jnp.zeros_like(masks.last),
        positions,
        pack_mask(sees(masks.last, masks.group)),
        mix=(jnp.ones(masks.last.shape), network.embedded(masks.group)),
    )
    ours = decoder.forward(network.beside(target, 0), cfg, window, slots, remat=remat).hidden
    return of_text, ours
