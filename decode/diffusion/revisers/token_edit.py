"""Overwrite tokens that the model, having read the others, would now write differently."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Reviser, check_range
from decode.diffusion.round import Revision, Round, log_confidence
from dlm.config import ModelConfig


@struct.dataclass
class TokenEdit(Reviser):
    """Replaces tokens of the open block where the model proposes another, and is sure of it.

    Every round edits the tokens that were decided in earlier rounds, beside the rule's commits: a
    token gives way to the present proposal if that is another one of probability > `threshold`. A
    full block stays open for more such rounds, until one changes nothing or `max_rounds` were made.
    The block's forwards are at most its undecided positions + `max_rounds` (rules that never idle).

    Edits go by the proposal's probability, whatever the method's confidence is; `step_map`,
    `log_prob` and `confidence` tell of the last edit. With a temperature proposals are samples:
    use a high threshold, or tokens keep being drawn again.

    The model must have learned to correct tokens. A stopper that ends rows inside a block ends
    their edits too: `EosBlock` waits for them.

    Reference: Bie et al., "LLaDA2.1: Speeding Up Text Diffusion via Token Editing",
    arXiv:2602.08676. (rule threshold, edit threshold) is (0.5, 0) in the speed mode, also the
    default of SGLang ("joint threshold"), and (0.7, 0.5) in the quality mode; 16 rounds in both.
    SGLang makes one more forward if the last round still changed something, which only writes its
    cache, and has an optional penalty on repeating the token before; both are left out.

    Attributes:
      threshold: in [0, 1], strict. 0: any other proposal; 1: no edits.
      max_rounds: >= 0, rounds on a full block.
    """

    threshold: jax.Array | float = 0.5
    max_rounds: jax.Array | int = 16

    def validate(self, cfg: ModelConfig) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_range("max_rounds", self.max_rounds, 0, float("inf"))

    def init(self, cfg: ModelConfig, batch_size: int, window_len: int) -> jax.Array:
        """[B] int32: rounds made on the full block."""
        return jnp.zeros(batch_size, jnp.int32)

    def revise(
        self, round: Round, commit: jax.Array, state: jax.Array
    ) -> tuple[Revision, jax.Array]:
        undecided = round.undecided & round.in_block
        was_full = ~undecided.any(axis=-1)
        is_full = ~(undecided & ~commit).any(axis=-1)
        rounds = jnp.where(round.block_step == 0, 0, state) + was_full
        may_edit = ~was_full | (rounds <= self.max_rounds)

        differs = round.in_block & ~round.undecided & (round.proposal != round.tokens)
        edit = differs & (round.log_prob > log_confidence(self.threshold)) & may_edit[:, None]
        settled = was_full & ~edit.any(axis=-1)
        hold = is_full & ~settled & (rounds < self.max_rounds)
        return Revision(commit | edit, hold=hold), rounds
