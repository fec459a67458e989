"""A trained filter decides which proposals stay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Round, check_range, surest
from dlm.config import ModelConfig
from dlm.heads.learn2pd import Filter


@struct.dataclass
class LearnedFilter(CommitRule):
    """Commits what a Learn2PD filter accepts, and the surest eligible position.

    keep_i = sigmoid(o_i) > threshold, with o the filter's answer to the confidences of all
    positions of the open block, decided or not. A threshold of 1 accepts nothing: one token per
    step; 0 accepts everything.

    Reference: Bao et al., "Learning to Parallel", arXiv:2509.25188, Sec. 3.2; published thresholds
    0.96 (LLaDA-8B-Instruct) and 0.9 (Dream-7B-Instruct), with blocks of 32.

    Attributes:
      filter: of `dlm.heads.learn2pd.load_filter`; trained with this block length and confidence.
      threshold: tau in [0, 1]; strict.
    """

    filter: Filter
    threshold: jax.Array | float = 0.96

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)

    def refuse(self, method: Any) -> str | None:
        C, confidence = self.filter.block_len, type(method.confidence).__name__
        block_len = getattr(method.scheduler, "block_len", None)
        if type(method.scheduler).__name__ != "FixedBlocks" or block_len != C:
            return (
                f"LearnedFilter was trained with blocks of {C}, and {method.scheduler} makes other "
                f"ones: use FixedBlocks({C})"
            )
        if confidence != self.filter.confidence:
            return (
                f"LearnedFilter was trained with {self.filter.confidence} as confidence, and "
                f"{confidence} is another: use {self.filter.confidence}, or train a filter for it"
            )
        return None

    def commit(self, view: Round, state: Any) -> tuple[jax.Array, Any]:
        C, W = self.filter.block_len, view.index.shape[1]
        confidence = jnp.where(view.in_block, jnp.exp(view.confidence), 0.0)
        # The window may start before the block: its columns, in the block's order.
        column = view.block_start[:, None] - view.index[:, :1] + jnp.arange(C)[None]  # [B, C]
        block = jnp.take_along_axis(confidence, jnp.minimum(column, W - 1), axis=-1)
        block = jnp.where(column < W, block, 0.0)
        keep = jax.nn.sigmoid(self.filter.logits(block)) > self.threshold  # [B, C]
        place = jnp.clip(view.index - view.block_start[:, None], 0, C - 1)  # [B, W]
        kept = jnp.take_along_axis(keep, place, axis=-1) & view.in_block
        return (kept & view.eligible) | surest(view.confidence, view.eligible), state
