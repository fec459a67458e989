"""Contrastive search: what is probable and unlike all that was said.

Reference: Su et al., "A Contrastive Framework for Neural Text Generation", arXiv:2202.06417, Eq. 5:
of the k most probable tokens v that is written for which

    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

is largest; h_v is the final state of v behind the text, h_j those of all positions before, the
prompt's included. The k candidates are read side by side in one forward behind one cache, which
then has what follows the chosen one: a forward of k tokens per token, and no cache is copied.

Letters: B prompts, k candidates, S slots, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.search.contracts import NEVER, Choice, Round, Strategy, Weighed, exists
from dlm.config import ModelConfig

LEAST_NORM = 1e-12


class ContrastiveState(struct.PyTreeNode):
    """What was said, and how probable the candidates are.

    Attributes:
      states: [B, S, D] float32. Final states of all positions, of length 1.
      log_probs: [B, k] float32. Of the candidates.
    """

    states: jax.Array
    log_probs: jax.Array


@struct.dataclass
class Contrastive(Strategy):
    """The probable token that is least like what came before.

    Attributes:
      k: >= 1, candidates. Static.
      alpha: in [0, 1], weight of likeness; 0: greedy.
    """

    looks_ahead: ClassVar[bool] = True
    commits: ClassVar[bool] = True

    k: int = struct.field(pytree_node=False, default=4)
    alpha: jax.Array | float = 0.6

    @classmethod
    def points(cls) -> Mapping[str, Strategy]:
        return {"contrastive": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if not 1 <= self.k <= cfg.vocab_size:
            raise ValueError(f"k={self.k} must be in [1, vocab_size={cfg.vocab_size}]")
        if not 0 <= float(self.alpha) <= 1:
            raise ValueError(f"alpha={float(self.alpha):g} must be in [0, 1]")

    @property
    def num_candidates(self) -> int:
        return self.k

    def init(self, cfg: ModelConfig, B: int, S: int, G: int) -> ContrastiveState:
        return ContrastiveState(jnp.zeros((B, S, cfg.d_model)), jnp.zeros((B, self.k)))

    def prefill(
        self, hidden: jax.Array, start: jax.Array, count: jax.Array, state: ContrastiveState
    ) -> ContrastiveState:
        T, S = hidden.shape[1], state.states.shape[1]
        at = start[:, None] + jnp.arange(T)[None]
        at = jnp.where(jnp.arange(T)[None] < count[:, None], at, S)
        rows = jnp.arange(len(at))[:, None]
        return state.replace(states=state.states.at[rows, at].set(_unit(hidden), mode="drop"))

    def choose(self, seen: Round, state: ContrastiveState) -> Choice:
        B = len(seen.length)
        unit, rows = _unit(seen.hidden[:, 0]), jnp.arange(B)  # [B, k, D]
        length = seen.length - seen.is_first  # of what is in `states`
        _, value = self._value(unit, length, state)
        node = jnp.where(seen.is_first, 0, jnp.argmax(value, axis=1)).astype(jnp.int32)
        states = state.states.at[rows, length].set(unit[rows, node], mode="drop")
        tokens, log_probs = (x[:, 0][rows, node] for x in seen.best(self.k))  # behind the node
        token = jnp.where(seen.is_first, -1, seen.candidates[rows, 0, node])
        log_prob = state.log_probs[rows, node]
        return Choice(
            source=jnp.zeros((B, 1), jnp.int32),
            token=token[:, None],
            log_prob=log_prob[:, None],
            score=seen.score + jnp.where(seen.is_first, 0, log_prob)[:, None],
            candidates=tokens[:, None],
            node=node[:, None],
            is_done=seen.is_end(token) & ~seen.is_first,
            state=ContrastiveState(states, log_probs),
        )

    def _value(
        self, unit: jax.Array, length: jax.Array, state: ContrastiveState
    ) -> tuple[jax.Array, jax.Array]:
        """Of candidates with states [B, k, D]: likeness and value, each [B, k]."""
        likeness = jnp.einsum("bkd,bsd->bks", unit, state.states)
        is_before = jnp.arange(state.states.shape[1])[None] < length[:, None]
        likeness = jnp.where(is_before[:, None], likeness, -1.0).max(axis=2)
        value = (1 - self.alpha) * jnp.exp(state.log_probs) - self.alpha * likeness
        return likeness, jnp.where(exists(state.log_probs), value, -jnp.inf)

    def weigh(self, seen: Round, state: ContrastiveState) -> Weighed:
        likeness, value = self._value(_unit(seen.hidden[:, 0]), seen.length, state)
        tokens = jnp.where(seen.is_first[:, None], -1, seen.candidates[:, 0])
        value = jnp.maximum(value, NEVER)[:, None]
        parts = {"p": jnp.exp(state.log_probs)[:, None], "like": likeness[:, None]}
        return Weighed(tokens[:, None], value, parts)


def _unit(hidden: jax.Array) -> jax.Array:
    """[..., D] float32 of length 1."""
    hidden = hidden.astype(jnp.float32)
    norm = jnp.linalg.norm(hidden, axis=-1, keepdims=True)
    return hidden / jnp.maximum(norm, LEAST_NORM)
