"""Wide in, narrow out: commit freely, and take back what does not hold."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import CommitRule, Points, Reviser, check_range
from decode.diffusion.round import Revision, Round, log_confidence, rank
from dlm.config import ModelConfig

_ACCEPTED_BEFORE_THE_FIRST_ROUND = 30


@struct.dataclass
class WideIn(CommitRule):
    """Commits confidences above `threshold`, at most min(max(0.7 n, 5), 20) of n masks per step.

    Reference: Hong et al., "Wide-In, Narrow-Out: Revokable Decoding for Efficient and Effective
    DLLMs" (WINO), arXiv:2507.18578, Alg. 1, and the constants of the public code.

    Attributes:
      threshold: in [0, 1], strict (0.6).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})

    threshold: jax.Array | float = 0.6

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)

    def commit(self, round: Round, state: Any) -> tuple[jax.Array, Any]:
        masks = round.eligible.sum(axis=-1)
        limit = jnp.clip(jnp.floor(masks.astype(jnp.float32) * 0.7), 5, 20)
        is_among_surest = rank(round.confidence, round.eligible) < limit[:, None]
        is_sure = round.confidence > log_confidence(self.threshold)
        return round.eligible & is_sure & is_among_surest, state


@struct.dataclass
class NarrowOut(Reviser):
    """Takes tokens back that MASK would not predict at their place, seeing all the others.

    A shadow of the block verifies it in the same forward: MASK tokens at the block's positions,
    each of which sees everything but the token at its own. Tokens whose probability there is below
    `threshold` become undecided again, fewer than were committed in the step before, and none in a
    step that commits a single token, so that blocks get done.

    Reference: WINO, see `WideIn`.

    Attributes:
      threshold: in [0, 1], strict (0.9).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"shadow"})

    threshold: jax.Array | float = 0.9

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {"wino": {"rule": WideIn(0.6), "reviser": cls(0.9)}}

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)
        if cfg.shifted_logits:
            raise ValueError(
                "NarrowOut needs a model that predicts position i at position i, and this one "
                "predicts it at i - 1 (shifted_logits=True): use another reviser"
            )

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B] int32: positions committed in the step before."""
        return jnp.full(batch_size, _ACCEPTED_BEFORE_THE_FIRST_ROUND, jnp.int32)

    def revise(
        self, round: Round, commit: jax.Array, state: jax.Array
    ) -> tuple[Revision, jax.Array]:
        assert round.shadow_log_prob is not None
        last = jnp.where(round.block_step == 0, _ACCEPTED_BEFORE_THE_FIRST_ROUND, state)
        decided = round.in_block & ~round.undecided
        fails = decided & (round.shadow_log_prob < log_confidence(self.threshold))
        accepted = commit.sum(axis=-1)
        limit = jnp.where(accepted > 1, last - 1, 0)
        take_back = fails & (rank(-round.shadow_log_prob, fails) < limit[:, None])
        return Revision(commit, take_back), accepted
