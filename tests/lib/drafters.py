"""Drafters for tests: right, wrong, or anything, on demand."""

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.streams import fold_in, uniforms
from decode.speculative.contracts import Drafter, Proposal, spent
from decode.speculative.tree import TreeShape, chain


@struct.dataclass
class Adversary(Drafter):
    """Drafts the greedy text with some probability per node, and else anything.

    Attributes:
      truth: [B, S] int32. The text of each row, prompt included.
      rate: [B] float32. Probability that a node is right.
      low, high: other drafts are in [low, high): ids that do not exist are among them.
    """

    reads_text = True

    truth: jax.Array
    rate: jax.Array
    low: int = struct.field(pytree_node=False, default=-2)
    high: int = struct.field(pytree_node=False, default=30)
    shape: TreeShape = struct.field(pytree_node=False, default=chain(3))

    def propose(self, cfg, context, state):
        W = self.num_nodes
        place = context.length[:, None] - 1 + jnp.array(self.shape.depths)[None]
        right = jnp.take_along_axis(self.truth, jnp.minimum(place, self.truth.shape[1] - 1), axis=1)
        coin = uniforms(fold_in(context.key, 10), W) < self.rate[:, None]
        other = uniforms(fold_in(context.key, 11), W) * (self.high - self.low) + self.low
        tokens = jnp.where(coin, right, jnp.floor(other).astype(jnp.int32))
        exists = uniforms(fold_in(context.key, 12), W) < 0.9
        tokens = tokens.at[:, 0].set(context.root)
        if self.is_chain:
            exists = jnp.cumprod(exists, axis=1).astype(bool)
        exists = exists.at[:, 0].set(True)
        for v, parent in enumerate(self.shape.parents, start=1):
            exists = exists.at[:, v].set(exists[:, v] & exists[:, parent])
        return Proposal(self.shape.tree(tokens, exists), spent(context, 0), state)
