"""Constraints for tests: regular languages of token ids, and what they are in plain Python."""

import jax
import jax.numpy as jnp
from flax import struct

from decode.diffusion.contracts import Constraint


@struct.dataclass
class Automaton(Constraint):
    """Texts on which an automaton goes on; token by token, by the law.

    Attributes:
      next: [Q, V] int32. From each state with each token; -1: nowhere. State 0 is the first.
    """

    needs = frozenset({"logits"})

    next: jax.Array

    def init(self, cfg, batch_size, window_len):
        return jnp.zeros(batch_size, jnp.int32)

    def mask_logits(self, frame, logits, state):
        return jnp.where(self.next[state][:, None] >= 0, logits, -jnp.inf)

    def accept(self, round, commit, state):
        following = self.next[state, round.proposal[:, 0]]
        return commit & (following >= 0)[:, None], jnp.where(commit[:, 0], following, state)


@struct.dataclass
class Monitor(Automaton):
    """The same, which says nothing before it refuses."""

    needs = frozenset()

    def mask_logits(self, frame, logits, state):
        raise AssertionError("nobody asks without a need")


def ways(table, text):
    """The state behind a text; -1: it is not of the language."""
    state = 0
    for token in text:
        state = int(table[state][token]) if state >= 0 else -1
    return state
