"""Cut the canvas behind the end of the text as soon as it shows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Points, Stopper, check_range
from decode.diffusion.round import Round
from dlm.config import ModelConfig


@struct.dataclass
class Eotp(Stopper):
    """Ends rows just past an end-of-text token (EOT): nothing behind it is seen or decoded again.

    After every round's commits the row's end moves down to behind one position, if there is one:

      "predicted" (the public code): the first committed EOT of the round; else, of the undecided
        positions from the open block on that propose EOT, the surest (the leftmost on ties). Eager:
        one position's opinion cuts the row, and what is committed there later may be another token.
      "committed" (as the paper tells it): the first committed EOT of the round.

    Undecided positions before the cut are decoded as usual, now without seeing anything behind it:
    attention and eligibility stop at the row's end, which is what taking the tail off the canvas
    does. Tokens decided behind the cut are dropped from the completion. An end never moves back up,
    even if a reviser takes the EOT back.

    In the public code only what the learned filter accepted counts as committed, not the position
    that is committed lest the round be idle; here both do.

    Reference: Bao et al., "Learning to Parallel: Accelerating Diffusion Large Language Models via
    Learnable Parallel Decoding" (End-of-Text Prediction), arXiv:2509.25188.

    Attributes:
      cut_at: "predicted" or "committed". The first must see the whole suffix, which the dual cache
        does not show.
      eot_id: in [0, vocab_size), the end-of-text token; None: any of the model's `eos_ids`.
    """

    cut_at: str = struct.field(pytree_node=False, default="predicted")
    eot_id: jax.Array | int | None = None

    @classmethod
    def points(cls, block_len: int) -> Points:
        return {
            "eotp": {"stopper": cls()},
            "eotp_committed": {"stopper": cls("committed")},
        }

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"suffix"} if self.cut_at == "predicted" else ())

    def validate(self, cfg: ModelConfig) -> None:
        if self.cut_at not in ("predicted", "committed"):
            raise ValueError(f"cut_at={self.cut_at!r} must be 'predicted' or 'committed'")
        if self.eot_id is not None:
            check_range("eot_id", self.eot_id, 0, cfg.vocab_size - 1)

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B, n] int32: the end-of-text tokens."""
        ids = cfg.eos_ids if self.eot_id is None else (self.eot_id,)
        return jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (batch_size, len(ids)))

    def cut(self, round: Round, commit: jax.Array, state: Any) -> jax.Array:
        is_eot = (round.proposal[..., None] == state[:, None]).any(axis=-1)
        is_eot &= round.index < round.gen_len[:, None]
        here = is_eot & commit
        at, found = jnp.argmax(here, axis=-1), here.any(axis=-1)
        if self.cut_at == "predicted":
            hoped = is_eot & round.undecided & ~commit
            sure = jnp.where(hoped, round.confidence, -jnp.inf)
            # Without a finite confidence among them, the leftmost.
            best = jnp.argmax(hoped & (sure == sure.max(axis=-1, keepdims=True)), axis=-1)
            at = jnp.where(found, at, best)
            found |= hoped.any(axis=-1)
        end = jnp.take_along_axis(round.index, at[:, None], axis=-1)[:, 0] + 1
        return jnp.where(found, end, round.gen_len)
