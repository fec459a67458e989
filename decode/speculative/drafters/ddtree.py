"""DDTree: the most probable prefixes of what a block drafter says, in the place of one chain.

Reference: Ringel and Romano, "Accelerating Speculative Decoding with Block Diffusion Draft Trees",
arXiv:2604.12989, and the public code. Drafters that guess all places in one forward know a law q_d
of every place d, whatever stands before it. If the text followed their product, a node would be
accepted with probability

    exp(w),  w = sum over the places d on the way to it of log q_d(token)

and a tree would accept as many drafts as these sum to. So the best tree of n nodes are the n
prefixes of largest w; no node is better than its parent, so they are a tree. They are found best
first: behind a node that is taken come its next sibling and its first child.

Which nodes there are follows from the text alone, so rules for drafts that were not drawn are
exact. Of equal nodes the reference takes the one whose ranks are lexicographically smaller; here it
is the one whose place on the heap is older.

Letters: B rows, J places, k tokens per place, n nodes, W = n + 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.component import check_numbers
from decode.speculative.contracts import Context, Drafter, Proposal, Seen
from decode.speculative.drafters.dflash import DFlash
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig
from dlm.params import Params


def best_first(
    root: jax.Array, tokens: jax.Array, log_probs: jax.Array, budget: jax.Array | int, most: int
) -> DraftTree:
    """The most probable prefixes, in the order of their probability.

    Args:
      root: [B] int32.
      tokens: [B, J, k] int32. Of every place, best first; of the k tokens all may come.
      log_probs: [B, J, k] float32. Of these; -inf: it is never taken.
      budget: in [0, most], nodes that are taken, the root aside; as far as there are so many.
      most: n. The tree has n + 1 nodes, and those that were not taken do not exist.
    """
    _, J, k = tokens.shape

    def one(root: jax.Array, tokens: jax.Array, log_probs: jax.Array) -> DraftTree:
        """Of one row. A prefix that may come next is its w, its parent, its place and its rank."""
        zeros = jnp.zeros(most + 1, jnp.int32)
        heap = (jnp.full(most + 1, -jnp.inf).at[0].set(log_probs[0, 0]), zeros, zeros, zeros)
        nodes = DraftTree(
            tokens=zeros.at[0].set(root),
            parents=zeros.at[0].set(-1),
            depths=jnp.ones_like(zeros).at[0].set(0),
            is_valid=jnp.zeros(most + 1, bool).at[0].set(True),
        )

        def of(place: jax.Array, rank: jax.Array | int) -> jax.Array:
            is_there = (place < J) & (rank < k)
            return jnp.where(is_there, log_probs.at[place, rank].get(mode="clip"), -jnp.inf)

        def take(i: jax.Array, carry: Any) -> Any:
            heap, tree, weights = carry
            at, node = jnp.argmax(heap[0]), i + 1
            weight, parent, place, rank = (x[at] for x in heap)
            tree = DraftTree(
                tokens=tree.tokens.at[node].set(tokens[place, rank]),
                parents=tree.parents.at[node].set(parent),
                depths=tree.depths.at[node].set(place + 1),
                is_valid=tree.is_valid.at[node].set(weight > -jnp.inf),
            )
            sibling = weights[parent] + of(place, rank + 1), parent, place, rank + 1
            child = weight + of(place + 1, 0), node, place + 1, 0
            # The sibling takes the node's own place on the heap, the child the first unused one.
            heap = tuple(
                x.at[at].set(of_sibling).at[node].set(of_child)
                for x, of_sibling, of_child in zip(heap, sibling, child, strict=True)
            )
            return heap, tree, weights.at[node].set(weight)

        start = heap, nodes, jnp.zeros(most + 1)
        tree: DraftTree = jax.lax.fori_loop(0, jnp.minimum(budget, most), take, start)[1]
        return tree

    return jax.vmap(one)(root, tokens, log_probs)


@struct.dataclass
class DDTree(Drafter):
    """The most probable tree of what DFlash, Medusa or masks say of each place; another per round.

    Attributes:
      drafter: who says it: any that has `num_marginals`.
      budget: in [0, max_budget], nodes that are judged, the root aside. The public code's, where
        nothing is said, is what DFlash drafts at once: b - 1 of blocks of b.
      max_budget: >= 1, n, for which there is room. Static.
    """

    notices_pauses: ClassVar[bool] = True

    drafter: Drafter
    budget: jax.Array | int = 16
    max_budget: int = struct.field(pytree_node=False, default=16)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(DFlash.example(cfg, params), budget=6, max_budget=7)

    def validate(self, cfg: ModelConfig) -> None:
        if not isinstance(self.drafter, Drafter) or not self.drafter.num_marginals:
            raise ValueError(
                f"drafter={type(self.drafter).__name__} must be one that says at once what is "
                "likely at each of several places, and does not draw: DFlash, Medusa, or Masks "
                "behind every node"
            )
        check_numbers(self.drafter)
        self.drafter.validate(cfg)
        if self.max_budget < 1:
            raise ValueError(f"max_budget={self.max_budget} must be at least 1")
        if not 0 <= int(np.asarray(self.budget)) <= self.max_budget:
            raise ValueError(
                f"budget={int(np.asarray(self.budget))} must be in [0, max_budget="
                f"{self.max_budget}]"
            )

    @property
    def num_nodes(self) -> int:
        return self.max_budget + 1

    @property
    def depth(self) -> int:
        return min(self.drafter.num_marginals, self.max_budget)

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def num_extra(self) -> int:
        return self.num_extra_beside(self.num_nodes)

    def num_extra_beside(self, num_nodes: int) -> int:
        return self.drafter.num_extra_beside(num_nodes)

    def params_of_extra(self, params: Params, num_nodes: int) -> Params:
        return self.drafter.params_of_extra(params, num_nodes)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.drafter.feature_layers

    @property
    def num_best(self) -> int:
        return self.drafter.num_best

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Any:
        """That of the drafter."""
        return self.drafter.init(cfg, batch_size, num_slots)

    def prefill(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        return self.drafter.prefill(cfg, context, seen, state)

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        # Before a token come all better ones of its place: n of each are enough.
        said = self.drafter.marginals(cfg, context, state, self.max_budget)
        tokens, log_probs = (x[:, : self.depth] for x in (said.tokens, said.log_probs))
        tree = best_first(context.root, tokens, log_probs, self.budget, self.max_budget)
        extra = self.drafter.rows_beside(tree, said.state)
        return Proposal(tree, said.cost, said.state, extra)

    def observe(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        return self.drafter.observe(cfg, context, seen, state)

    def keep(
        self, cfg: ModelConfig, state: Any, length: jax.Array, num_kept: jax.Array
    ) -> tuple[Any, jax.Array]:
        return self.drafter.keep(cfg, state, length, num_kept)

    def pause(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        sees = self.drafter.pause if self.drafter.notices_pauses else self.drafter.observe
        return sees(cfg, context, seen, state)
