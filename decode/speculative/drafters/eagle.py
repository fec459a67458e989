"""EAGLE: one decoder layer continues the target's features, and drafts a tree of them.

References: Li et al., EAGLE-1, arXiv:2401.15077 (a tree of one shape, also drawn); EAGLE-2,
arXiv:2406.16858 (the most probable tree); EAGLE-3, arXiv:2503.01840 (another network, either tree).
See `dlm.heads.eagle` for what the network reads.

With n tokens written, the root x_n included, the network's cache holds positions 1 to n - 1, each a
true feature of the target and the token behind it; what was just accepted is read at the beginning
of a round. The state of the last of them drafts the children of the root, and below that a node
reads its own token beside its parent's state, at the position one behind its parent's. Of drafts
nothing is written to the cache.

Letters: B rows, S slots, W nodes, J depth, E nodes that are expanded, F feature width, D width of
the target, V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Drafter, Proposal, Seen, spent
from decode.speculative.drafters.expansion import BestTree, expand, expand_best
from decode.speculative.drafters.heads import check_fit, place_cache
from decode.speculative.tree import DraftTree, TreeShape, from_paths
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.heads.eagle import EagleNetwork
from dlm.heads.eagle_1 import Eagle1Heads
from dlm.heads.eagle_3 import Eagle3Heads
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask

# EAGLE-1's published tree: 25 nodes and the root.
PUBLISHED = from_paths(
    [
        *([i] for i in range(4)),
        *([0, i] for i in range(3)),
        *([1, i] for i in range(2)),
        *([2, i] for i in range(2)),
        [3, 0],
        *([0, 0, i] for i in range(3)),
        *([0, 1, i] for i in range(2)),
        *([0, 2, i] for i in range(2)),
        [1, 0, 0],
        *([0, 0, 0, i] for i in range(3)),
        *([0, 0, 0, 0, i] for i in range(2)),
    ]
)


class EagleState(struct.PyTreeNode):
    """What is known of the text.

    Attributes:
      cache: of the network's layers, a slot per position.
      features: [B, J + 1, F]. Of the positions before the root whose features are new.
      count: [B] int32. How many of them there are; 0 only before anything was read.
    """

    cache: KVCache
    features: jax.Array
    count: jax.Array


@struct.dataclass
class _Network(Drafter):
    """What both ways of drafting share.

    Attributes:
      network: of `dlm.heads.eagle_1.load` or `dlm.heads.eagle_3.load`.
    """

    notices_pauses: ClassVar[bool] = True
    network: EagleNetwork

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.network.feature_layers

    def validate(self, cfg: ModelConfig) -> None:
        network = self.network
        check_fit(network.cfg.vocab_size, network.target_width, self.feature_layers, cfg)

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> EagleState:
        shape = (batch_size, self.depth + 1, self.network.feature_width)
        return EagleState(
            cache=place_cache(self.network.cfg, batch_size, num_slots),
            features=jnp.zeros(shape, cfg.jnp_dtype),
            count=jnp.zeros(batch_size, jnp.int32),
        )

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: EagleState
    ) -> EagleState:
        """Reads all positions; the last one is read again by `propose`, which wants its state."""
        features = self._features(seen)
        T = features.shape[1]
        place = seen.start[:, None] + jnp.arange(T)[None]
        _, cache = self.network.read(
            context.params,
            self.network.begin(features),
            Window(_tokens_at(context, place + 1), place, is_causal=True),
            Slots.append(state.cache, seen.start),
        )
        assert cache is not None
        index = jnp.maximum(seen.count - 1, 0)[:, None, None]
        last = jnp.take_along_axis(features, index, axis=1)
        is_new = seen.count > 0
        return EagleState(
            cache=cache,
            features=state.features.at[:, :1].set(
                jnp.where(is_new[:, None, None], last, state.features[:, :1])
            ),
            count=jnp.where(is_new, 1, state.count),
        )

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: EagleState
    ) -> EagleState:
        return state.replace(features=self._features(seen), count=seen.count)

    def pause(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: EagleState
    ) -> EagleState:
        """What `propose` would have read is read."""
        _, cache = self._read_new(context, state)
        return self.observe(cfg, context, seen, state.replace(cache=cache))

    def keep(
        self, cfg: ModelConfig, state: EagleState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[EagleState, jax.Array]:
        """Without features that are not read yet, and the last position, which knows the next."""
        known = jnp.minimum(length - 1 - state.count, num_kept - 1)
        return state, jnp.maximum(known, 0)

    def _features(self, seen: Seen) -> jax.Array:
        if not self.feature_layers:
            return seen.hidden
        assert seen.features is not None
        return seen.features

    def _read_new(self, context: Context, state: EagleState) -> tuple[jax.Array, KVCache]:
        """The state [B, 1, D] that drafts the children of the root, and the cache up to it.

        A prompt of one token has no position before the root: its state is zero.
        """
        T = state.features.shape[1]
        start = context.length - 1 - state.count
        place = start[:, None] + jnp.arange(T)[None]
        states, cache = self.network.read(
            context.params,
            self.network.begin(state.features),
            Window(_tokens_at(context, place + 1), place, is_causal=True),
            Slots.append(state.cache, start, context.active),
        )
        assert cache is not None
        last = jnp.maximum(state.count - 1, 0)[:, None, None]
        of_root = jnp.take_along_axis(states, last, axis=1)
        return jnp.where((state.count > 0)[:, None, None], of_root, 0), cache

    def _read_nodes(
        self, context: Context, tree: DraftTree, states: jax.Array, cache: KVCache, depth: int
    ) -> jax.Array:
        """States [B, n, D] of all nodes but the root.

        Args:
          context: of the round.
          tree: the n + 1 nodes.
          states: [B, n + 1, D]. Of the root and of all nodes that are parents.
          cache: of the positions before.
          depth: at least that of the deepest node.
        """
        start = context.length - 1
        above = jnp.take_along_axis(states, tree.parents[:, 1:, None], axis=1)
        window = Window(
            tokens=tree.tokens[:, 1:],
            positions=start[:, None] - 1 + tree.depths[:, 1:],
            mask=pack_mask(tree.ancestors(depth)[:, 1:, 1:]),
        )
        return self.network.read(
            context.params, self.network.feed(above), window, Slots.below(cache, start)
        )[0]


@struct.dataclass
class Eagle(_Network):
    """A tree of one shape, one forward per level of a trained layer over the target's features.

    Attributes:
      shape: of the tree, a chain for example. Static.
      is_sampled: whether siblings are drawn without replacement, for `SpeculativeSampling`; else
        they are the most probable tokens. Static.
    """

    shape: TreeShape = struct.field(pytree_node=False, default=PUBLISHED)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = Eagle3Heads()
        own = heads.fresh(jax.random.key(0), cfg, params)
        return cls(heads.network(cfg, own), from_paths([[0], [1], [0, 0], [0, 1], [1, 0]]))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        most = max(self.shape.ranks, default=-1) + 1
        if most > self.network.num_ids:
            raise ValueError(
                f"shape has nodes with {most} children, and the network drafts "
                f"{self.network.num_ids} different tokens: use a narrower tree"
            )

    def propose(self, cfg: ModelConfig, context: Context, state: EagleState) -> Proposal:
        of_root, cache = self._read_new(context, state)
        states = jnp.zeros((len(of_root), self.num_nodes, of_root.shape[-1]), of_root.dtype)
        states = states.at[:, :1].set(of_root)

        def score(tokens: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
            nonlocal states
            if nodes != (0,):
                known = slice(nodes[-1] + 1)  # nodes behind the last one are above none of them
                tree = jax.tree.map(lambda x: x[:, known], self.shape.tree(tokens))
                read = self._read_nodes(context, tree, states[:, known], cache, self.depth)
                index = jnp.array(nodes)
                states = states.at[:, index].set(read[:, index - 1])
            return self.network.logits(context.params, states[:, jnp.array(nodes)])

        tree = expand(self.shape, context, score, self.is_sampled, self.network.ids)
        return Proposal(tree, spent(context, self.depth), state.replace(cache=cache))


@struct.dataclass
class EagleBest(BestTree, _Network):
    """The most probable tree of a trained layer (EAGLE-2), another one in every round.

    Which nodes there are follows from the context alone, so any rule for drafts that were not drawn
    is exact.
    """

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = Eagle1Heads()
        own = heads.fresh(jax.random.key(0), cfg, params)
        return cls(heads.network(cfg, own), width=3, levels=3, budget=9)

    @property
    def num_ids(self) -> int:
        return self.network.num_ids

    def propose(self, cfg: ModelConfig, context: Context, state: EagleState) -> Proposal:
        states, cache = self._read_new(context, state)

        def score(
            tokens: jax.Array, parents: jax.Array, depths: tuple[int, ...], nodes: tuple[int, ...]
        ) -> jax.Array:
            nonlocal states
            if nodes != (0,):
                rows = jnp.broadcast_to(jnp.array(depths, jnp.int32), tokens.shape)
                tree = DraftTree(tokens, parents, rows, jnp.ones(tokens.shape, bool))
                known = jax.tree.map(lambda x: x[:, : nodes[-1] + 1], tree)
                below = jnp.zeros((len(states), len(nodes), states.shape[-1]), states.dtype)
                every = jnp.concatenate([states, below], axis=1)
                read = self._read_nodes(context, known, every, cache, self.levels)
                states = jnp.concatenate([states, read[:, -len(nodes) :]], axis=1)
            return self.network.logits(context.params, states[:, jnp.array(nodes)])

        tree = expand_best(self.width, self.levels, self.budget, context, score, self.network.ids)
        return Proposal(tree, spent(context, self.levels), state.replace(cache=cache))


def _tokens_at(context: Context, place: jax.Array) -> jax.Array:
    """[B, n] int32: the text at positions [B, n]; behind its end, anything."""
    return jnp.take_along_axis(context.tokens, place, axis=1, mode="clip")
