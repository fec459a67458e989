"""DFlash's network learns to draft blocks that begin anywhere in a text.

References: Chen et al., "DFlash", arXiv:2602.06036, and public training codes; the network is
`dlm.heads.dflash`. Per row, A anchors a are drawn among the positions before tokens that count, and
a block [x_a, MASK, ..] of b positions stands at each. It sees the context rows before its anchor
and itself. Slot i learns token a + i, less the further away it is:

    loss = sum w_i -log q_i(x_{a+i}) / sum w_i        w_i = exp(-(i - 1) / g)

over all blocks and the slots whose tokens count: completions up to their first EOS. (Public codes
leave out anchors too close to the end for a whole block.) `DPaceLoss` weighs by how likely a slot
is to be reached.

Letters: B batch, T positions, A anchors per row, b block length, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dlm import vocab
from dlm.blocks.attention import project_qkv
from dlm.blocks.rotary import rotary_angles
from dlm.config import ModelConfig
from dlm.heads.dflash import DFlashHeads, DFlashNetwork
from dlm.params import Params
from dlm.trainable import Learned
from train.draft_attention import draft_attention
from train.losses import draft_metrics, soft_cross_entropy
from train.objectives import Context, Objective
from train.reading import Text, read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFlashLoss(Objective):
    """Goes with `dlm.heads.dflash:DFlashHeads` as `train.trainable`.

    Attributes:
      num_anchors: A >= 1 (published: up to 512).
      reach: g > 0 (public codes: 7 with blocks of 16, 4 with blocks of 8).
      teacher: whether the target's distribution is learned, not the text.
      on_prompt: whether tokens of the prompt are learned too.
    """

    goes_with = DFlashHeads

    num_anchors: int = 64
    reach: float = 7.0
    teacher: bool = False
    on_prompt: bool = False

    def __post_init__(self) -> None:
        if self.num_anchors < 1:
            raise ValueError(f"num_anchors={self.num_anchors} must be at least 1")
        if not self.reach > 0:
            raise ValueError(f"reach={self.reach} must be positive")

    def weigh(self, losses: jax.Array, is_scored: jax.Array) -> jax.Array:
        """[.., b - 1] float32 weights of slots, whose losses [.., b - 1] are known."""
        slots = jnp.exp(-jnp.arange(losses.shape[-1]) / self.reach)
        return jnp.broadcast_to(slots, losses.shape)

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch. Args: as `Objective`; `own` is a network.

        Returns:
          Scalar float32, and metrics: "loss", and those of `train.losses.draft_metrics`, a draft
          per slot and a root per anchor.
        """
        network: DFlashNetwork = learned.own
        target = learned.target
        text = jax.lax.stop_gradient(
            read_text(target, cfg, batch, self.on_prompt, feature_layers=network.feature_layers)
        )
        B, T = text.tokens.shape
        b = network.block_len
        # -- Anchors: before a token that counts.
        may_begin = jnp.pad(text.is_scored[:, 1:], ((0, 0), (0, 1)))
        may_begin &= jnp.arange(T)[None] >= text.start[:, None]
        order = jax.random.uniform(context.key, (B, T)) + may_begin
        found, anchors = jax.lax.top_k(order, min(self.num_anchors, T))  # [B, A]
        hidden = read_blocks(network, target, text, anchors)[:, :, 1:]

        # -- Scores
        place = anchors[..., None] + jnp.arange(1, b)[None, None]  # [B, A, b - 1]
        rows = jnp.arange(B)[:, None, None]
        is_scored = text.is_scored.at[rows, place].get(mode="fill", fill_value=False)
        is_scored &= (found >= 1)[..., None]
        targets = text.tokens.at[rows, place].get(mode="clip")
        head = vocab.head(target)
        flat = hidden.reshape(B, -1, hidden.shape[-1])
        stats = vocab.score(head, flat, targets.reshape(B, -1))
        each = -stats.log_prob
        if self.teacher:
            theirs = text.hidden.at[rows, place - 1].get(mode="clip").reshape(flat.shape)
            each = soft_cross_entropy(head, flat, head, theirs)
        each = each.reshape(place.shape)
        weight = jnp.where(is_scored, self.weigh(each, is_scored), 0.0)
        loss = (weight * jnp.where(is_scored, each, 0.0)).sum() / jnp.maximum(weight.sum(), 1e-9)
        is_right = stats.token.reshape(place.shape) == targets
        drafts = [(is_right[..., i], is_scored[..., i]) for i in range(b - 1)]
        return loss, {"loss": loss, **draft_metrics(drafts)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPaceLoss(DFlashLoss):
    """DFlash's loss with weights that follow from how likely slots are reached.

    Reference: "D-PACE", arXiv:2605.18810. With q_i the probability of slot i's token,

        s_i = (1 - l) q_i + l        P_i = s_1 .. s_i        w_i = sum of P_j over j >= i

    through which no gradient flows.

    Attributes:
      smoothing: l in [0, 1].
    """

    smoothing: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing={self.smoothing} must be in [0, 1]")

    def weigh(self, losses: jax.Array, is_scored: jax.Array) -> jax.Array:
        s = (1 - self.smoothing) * jnp.exp(-losses) + self.smoothing
        reached = jnp.where(is_scored, jnp.cumprod(s, axis=-1), 0.0)
        return jax.lax.stop_gradient(jnp.cumsum(reached[..., ::-1], axis=-1)[..., ::-1])


def read_blocks(
    network: DFlashNetwork, target: Params, text: Text, anchors: jax.Array
) -> jax.Array:
    """Final states [B, A, b, D] of the blocks that begin at `anchors` [B, A], indices of T."""
    assert text.features is not None
    cfg, b = network.cfg, network.block_len
    B, A = anchors.shape
    c = network.context(text.features)
    roots = jnp.take_along_axis(text.tokens, anchors, axis=1)
    first = jnp.take_along_axis(text.positions, anchors, axis=1)
    positions = (first[..., None] + jnp.arange(b)[None, None]).reshape(B, A * b)
    of_text = rotary_angles(text.positions, cfg)
    place = anchors[..., None] + jnp.arange(b)[None, None]  # [B, A, b]
    in_groups = lambda x: x.reshape(B, A, b, *x.shape[2:])  # noqa: E731

    def attention(
        i: jax.Array, reach: jax.Array | None, p: Params, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        _, text_k, text_v = project_qkv(c, p["attention"], cfg, of_text)
        first = text.start[:, None, None]
        if reach is not None:
            first = jnp.maximum(first, place + 1 - reach)
        limits = jnp.stack(jnp.broadcast_arrays(first, anchors[..., None]), axis=-1)
        q, k, v = map(in_groups, (q, k, v))
        seen = draft_attention(q, text_k, text_v, k, v, limits, is_causal=network.is_causal)
        return seen.reshape(B, A * b, *seen.shape[3:])

    tokens = network.blocks(roots).reshape(B, A * b)
    return in_groups(network.run(target, tokens, positions, attention))
