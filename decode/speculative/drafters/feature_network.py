"""What drafters share that continue the target's features (EAGLE): the cache of their layers.

See `dlm.heads.eagle` for what the network reads.

With n tokens written, the root x_n included, the network's cache holds positions 1 to n - 1, each a
true feature of the target and the token behind it; what was just accepted is read at the beginning
of a round. The state of the last of them drafts the children of the root, and below that a node
reads its own token beside its parent's state, at the position one behind its parent's. Of drafts
nothing is written to the cache.

Letters: B rows, S slots, n nodes below the root, J depth, T positions seen at once, F feature
width, D width of the target.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Drafter, Seen
from decode.speculative.drafters.heads import check_fit, place_cache
from decode.speculative.tree import DraftTree
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.heads.eagle import EagleNetwork
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask


class FeatureState(struct.PyTreeNode):
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
class FeatureNetwork(Drafter):
    """What drafters of such a network share.

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

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> FeatureState:
        shape = (batch_size, self.depth + 1, self.network.feature_width)
        return FeatureState(
            cache=place_cache(self.network.cfg, batch_size, num_slots),
            features=jnp.zeros(shape, cfg.jnp_dtype),
            count=jnp.zeros(batch_size, jnp.int32),
        )

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: FeatureState
    ) -> FeatureState:
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
        return FeatureState(
            cache=cache,
            features=state.features.at[:, :1].set(
                jnp.where(is_new[:, None, None], last, state.features[:, :1])
            ),
            count=jnp.where(is_new, 1, state.count),
        )

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: FeatureState
    ) -> FeatureState:
        features = jnp.where(context.active[:, None, None], self._features(seen), state.features)
        count = jnp.where(context.active, seen.count, state.count)
        return state.replace(features=features, count=count)

    def pause(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: FeatureState
    ) -> FeatureState:
        """What `propose` would have read is read."""
        _, cache = self._read_new(context, state)
        return self.observe(cfg, context, seen, state.replace(cache=cache))

    def keep(
        self, cfg: ModelConfig, state: FeatureState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[FeatureState, jax.Array]:
        """Without features that are not read yet, and the last position, which knows the next."""
        known = jnp.minimum(length - 1 - state.count, num_kept - 1)
        return state, jnp.maximum(known, 0)

    def _features(self, seen: Seen) -> jax.Array:
        if not self.feature_layers:
            return seen.hidden
        assert seen.features is not None
        return seen.features

    def _read_new(self, context: Context, state: FeatureState) -> tuple[jax.Array, KVCache]:
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


def _tokens_at(context: Context, place: jax.Array) -> jax.Array:
    """[B, n] int32: the text at positions [B, n]; behind its end, anything."""
    return jnp.take_along_axis(context.tokens, place, axis=1, mode="clip")
