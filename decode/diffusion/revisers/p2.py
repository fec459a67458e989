"""Path planning: in every round the positions that a planner trusts most stand, decided or not."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Points, Reviser, check_range
from decode.diffusion.round import Revision, Round
from dlm.config import ModelConfig


@struct.dataclass
class P2(Reviser):
    """Ranks decided and undecided positions together; the best stay, the others are undecided.

    After round i of a block with L positions, the floor((i + 1) L / steps) of the highest scores
    stand. The score of an undecided position is the log-probability of its proposal, that of a
    decided one

        eta times the log-probability of the token that stands there,

    so that mistakes can be undone. eta = 0 never takes anything back: the surest first, as many
    per round as the schedule says. 1 is neutral, more than that takes back more. Ties go to what is
    decided, then to the left. It decides by itself: what the rule says makes no difference, and a
    block takes `steps` forwards.

    Reference: Peng et al., "Path Planning for Masked Diffusion Model Sampling", arXiv:2502.03540,
    with self-planning. Left out: planners of their own (a masked language model, a trained one),
    and noise on the scores.

    Attributes:
      steps: >= 1, rounds per block.
      eta: >= 0 (1; 1 to 2).
      planner: "self": the model judges a token that it sees at its place, and so leans towards it;
        "shadow": it judges the token from everything else, which makes the forward longer by the
        window. Static.
    """

    decides: ClassVar[bool] = True

    steps: jax.Array | int = 32
    eta: jax.Array | float = 1.0
    planner: str = struct.field(pytree_node=False, default="self")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"standing" if self.planner == "self" else "shadow"})

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "p2": {"reviser": cls(block_len)},
            "p2_2": {"reviser": cls(max(block_len // 2, 1))},
            "p2_shadow": {"reviser": cls(block_len, planner="shadow")},
        }

    def validate(self, cfg: ModelConfig) -> None:
        check_range("steps", self.steps, 1, float("inf"), " rounds")
        check_range("eta", self.eta, 0, float("inf"))
        if self.planner not in ("self", "shadow"):
            raise ValueError(f"planner={self.planner!r} must be 'self' or 'shadow'")
        if self.planner == "shadow" and cfg.shifted_logits:
            raise ValueError(
                "planner='shadow' needs a model that predicts position i at position i, and this "
                "one predicts it at i - 1 (shifted_logits=True): use 'self'"
            )

    def revise(self, round: Round, commit: jax.Array, state: tuple) -> tuple[Revision, tuple]:
        planned = round.standing_log_prob if self.planner == "self" else round.shadow_log_prob
        assert planned is not None
        decided = round.in_block & ~round.undecided
        score = jnp.where(decided, self.eta * planned, round.log_prob)
        score = jnp.where(decided | round.eligible, score, -jnp.inf)
        order = jnp.lexsort((round.undecided, -score), axis=-1)  # stable: then to the left
        place = jnp.argsort(order, axis=-1)

        steps = jnp.asarray(self.steps, jnp.int32)
        made = jnp.minimum(round.block_step + 1, steps)
        num = made * round.in_block.sum(axis=-1) // steps
        stays = place < num[:, None]
        return Revision(round.eligible & stays, decided & ~stays, hold=made < steps), state
