"""Jacobi decoding: the target's own guesses about further tokens, improved in every round.

Reference: Santilli et al., "Accelerating Transformer Inference for Translation via Parallel
Decoding", arXiv:2305.10427. A window of guesses is judged as a chain of drafts; what the target
puts behind each of them, in the light of the guesses before, are the next guesses. After k rounds
at least k tokens are right, and no model but the target is needed.

Letters: B rows, J guesses.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Drafter, Proposal, Seen, spent
from decode.speculative.tree import TreeShape, chain
from dlm.config import ModelConfig


@struct.dataclass
class Jacobi(Drafter):
    """A chain of the iterates of the rounds before; nothing is trained.

    Attributes:
      num_guesses: J >= 1. Static.
    """

    num_guesses: int = struct.field(pytree_node=False, default=8)

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"jacobi": cls()}

    def validate(self, cfg: ModelConfig) -> None:
        if self.num_guesses < 1:
            raise ValueError(f"num_guesses={self.num_guesses} must be at least 1")

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_guesses)

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> jax.Array:
        """[B, J] int32: guesses; -1: the root, as there is no better one."""
        return jnp.full((batch_size, self.num_guesses), -1, jnp.int32)

    def keep(
        self, cfg: ModelConfig, state: jax.Array, length: jax.Array, num_kept: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """What was guessed to follow the old text says nothing of the new one."""
        return jnp.full_like(state, -1), num_kept

    def propose(self, cfg: ModelConfig, context: Context, state: jax.Array) -> Proposal:
        root = context.root[:, None]
        guesses = jnp.where(state < 0, root, state)
        return Proposal(
            chain(self.num_guesses).tree(jnp.concatenate([root, guesses], axis=1)),
            spent(context, 0),
            state,
        )

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: jax.Array
    ) -> jax.Array:
        """What stands behind the nodes after the last one kept; the newest guess fills up.

        Guesses that were not judged stay what they were.
        """
        assert seen.chosen is not None
        said = jnp.concatenate([seen.chosen, state[:, seen.chosen.shape[1] :]], axis=1)
        index = seen.count[:, None] + jnp.arange(self.num_guesses)[None]
        return jnp.take_along_axis(said, jnp.minimum(index, said.shape[1] - 1), axis=1)
