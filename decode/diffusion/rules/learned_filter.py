"""A trained filter decides which proposals stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, check_range
from decode.diffusion.round import Round, surest
from dlm.config import ModelConfig
from dlm.heads.learn2pd import Filter, init_filter

if TYPE_CHECKING:
    from decode.diffusion.method import DiffusionMethod


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

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    filter: Filter
    threshold: jax.Array | float = 0.96

    @classmethod
    def example(cls, cfg: ModelConfig) -> Self:
        return cls(init_filter(jax.random.key(0), 32))

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)

    def refuse(self, method: DiffusionMethod) -> str | None:
        C, confidence = self.filter.block_len, method.confidence.name
        if method.scheduler.fixed_len != C or method.scheduler.opens_early:
            return (
                f"LearnedFilter was trained with blocks of {C}, and {method.scheduler} makes other "
                f"ones, or several at once: use blocks of that length, one at a time"
            )
        if confidence != self.filter.confidence:
            return (
                f"LearnedFilter was trained with {self.filter.confidence} as confidence, and "
                f"{confidence} is another: use {self.filter.confidence}, or train a filter for it"
            )
        return None

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        C, W = self.filter.block_len, round.index.shape[1]
        confidence = jnp.where(round.in_block, jnp.exp(round.confidence), 0.0)
        # The window may start before the block: its columns, in the block's order.
        column = round.block_start[:, None] - round.index[:, :1] + jnp.arange(C)[None]  # [B, C]
        block = jnp.take_along_axis(confidence, jnp.minimum(column, W - 1), axis=-1)
        block = jnp.where(column < W, block, 0.0)
        keep = jax.nn.sigmoid(self.filter.logits(block)) > self.threshold  # [B, C]
        place = jnp.clip(round.index - round.block_start[:, None], 0, C - 1)  # [B, W]
        kept = jnp.take_along_axis(keep, place, axis=-1) & round.in_block
        return (kept & round.eligible) | surest(round.confidence, round.eligible), state
