"""A block-diffusion model drafts for itself: a block at once, which it judges from left to right.

A model that was taught to fill blocks is autoregressive in blocks of one. So the same weights draft
the rest of a block in one forward, whose positions all see each other, and say in the next forward,
read from left to right, how much of it they would have written themselves:

    draft   [known tokens of the block, MASK, MASK, ..], everything before it from the cache
    judge   as any chain: rows of a causal model, or "2L" rows (`decode.speculative.in_place`)

The cache is the autoregressive one in both forwards ("cache_ver"), and nothing of the draft's
forward is kept. Rounds do not cross the end of a block but for the token behind it. So the text is
that of the model's blocks of one, token for token, and with drawn drafts and `SpeculativeSampling`
or `BlockVerification` it follows the same law. Trained with `train.objectives.block_diffusion`,
best with `causal_context`, whose blocks are learned behind just this cache.

References: "S2D2", arXiv:2603.25702 (its verification in every step, of all that is left of the
block); blocks that begin at the root: LinearSpec of Nemotron-Labs-Diffusion, arXiv:2607.05722.

Letters: B rows, C positions per block, J drafts, T rows of the forward, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import draw
from decode.speculative.contracts import Context, Drafter, Proposal, spent
from decode.speculative.tree import TreeShape, chain
from dlm import vocab
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask


@struct.dataclass
class SelfSpeculation(Drafter):
    """The rest of a block, from one forward of the target itself; most probable or drawn.

    So a round is two forwards of the target, one of which counts as the draft's.

    Attributes:
      block_len: C >= 2, positions per block, as trained. Static.
      aligned: whether blocks are the model's own, counted from the start of the prompt (S2D2), of
        which up to C tokens are drafted; False: every round's begins at the root, of which C - 1
        are (LinearSpec). Static.
      is_sampled: whether drafts are drawn from the distributions of their positions, for
        `SpeculativeSampling` and `BlockVerification`; else they are its most probable tokens.
        Static.
      mask_id: >= -1, the token that asks for another one; -1: the model's MASK. Static.
    """

    block_len: int = struct.field(pytree_node=False, default=4)
    aligned: bool = struct.field(pytree_node=False, default=True)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    mask_id: int = struct.field(pytree_node=False, default=-1, kw_only=True)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(mask_id=cfg.pad_token_id)

    def validate(self, cfg: ModelConfig) -> None:
        if self.block_len < 2:
            raise ValueError(f"block_len={self.block_len} must be at least 2: one draft or more")
        if not -1 <= self.mask_id < cfg.vocab_size:
            raise ValueError(
                f"mask_id={self.mask_id} must be in [0, vocab_size={cfg.vocab_size}), or -1"
            )
        if self.mask_id < 0 and cfg.mask_token_id is None:
            raise ValueError(
                "mask_id=-1 is the model's MASK, and it has none: drafting for itself needs a "
                "model that was taught to fill blocks"
            )

    @property
    def shape(self) -> TreeShape:
        return chain(self.block_len - 1 + self.aligned)

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        n, J = context.length, self.depth
        start = n - n % self.block_len if self.aligned else n - 1  # of the block
        hidden = self._fill(cfg, context, start)
        row = n - start + self.aligned - cfg.shifted_logits  # that speaks of the first draft
        place = jnp.minimum(row[:, None] + jnp.arange(J)[None], hidden.shape[1] - 1)
        hidden = jnp.take_along_axis(hidden, place[..., None], axis=1)  # [B, J, D]

        mask_id, probs = self._mask_id(cfg), None
        head, banned = vocab.head(context.params), jnp.array([mask_id])
        if self.is_sampled and context.sampling.temperature is not None:
            sampling = context.sampling.replace(repetition_penalty=None)
            probs = sampling.probs(vocab.logits(head, hidden, banned_ids=banned))
            drafts = draw(context.key, probs)
            probs = jnp.pad(probs, ((0, 0), (0, 1), (0, 0)))  # the last node has no child
        else:
            drafts = vocab.read(head, hidden, banned_ids=banned).token
        tokens = jnp.concatenate([context.root[:, None], drafts], axis=1)
        is_inside = n[:, None] - 1 + jnp.arange(J + 1)[None] < (start + self.block_len)[:, None]
        is_inside = is_inside.at[:, 0].set(True)
        return Proposal(self.shape.tree(tokens, is_inside, probs), spent(context, 1), state)

    def _fill(self, cfg: ModelConfig, context: Context, start: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] of the block from `start` [B] on, MASK where nothing is written.

        In front of an aligned block there is one row more, the last one of the block before it:
        it may be the root, which is not in the cache yet.
        """
        first = start - self.aligned
        place = first[:, None] + jnp.arange(self.block_len + self.aligned)[None]  # [B, T]
        known = jnp.take_along_axis(context.tokens, jnp.maximum(place, 0), axis=1, mode="clip")
        in_block = place >= start[:, None]
        sees = in_block[:, :, None] | ~in_block[:, None]
        window = Window(
            tokens=jnp.where(place < context.length[:, None], known, self._mask_id(cfg)),
            positions=jnp.maximum(place, 0),
            mask=pack_mask(sees & (place >= 0)[:, None]),
        )
        assert context.cache is not None
        slots = Slots.below(context.cache, jnp.maximum(first, 0)).replace(length=context.end)
        return decoder.forward(context.params, cfg, window, slots).hidden

    def _mask_id(self, cfg: ModelConfig) -> int:
        """The token that asks."""
        if self.mask_id >= 0 or cfg.mask_token_id is None:
            return self.mask_id
        return cfg.mask_token_id
