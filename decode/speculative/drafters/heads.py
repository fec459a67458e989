"""What drafters that are trained beside a target share.

Letters: D width of the target, U draft vocabulary, J heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct

from decode.speculative.contracts import Context, Drafter, Seen
from decode.speculative.tree import TreeShape, check_shape, from_paths
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.params import Params

# Medusa's published tree for Vicuna-7B: 64 nodes with the root.
PUBLISHED = from_paths(
    [
        *([i] for i in range(10)),
        *([i, j] for i, n in enumerate((10, 7, 3, 2, *[1] * 6)) for j in range(n)),
        *([0, i, j] for i, n in enumerate((10, 3, 2, *[1] * 5)) for j in range(n)),
        *([1, 0, 0], [1, 0, 1], [2, 0, 0]),
        *([0, 0, 0, 0], [0, 0, 0, 1]),
    ]
)


@struct.dataclass
class HeadsDrafter(Drafter):
    """Remembers the hidden state that predicted the root.

    Attributes:
      own: the heads' parameters; "unembed" [J, U, D] is among them, and "ids" [U] if they draft
        only some tokens.
      shape: of the tree, no deeper than there are heads. Static.
    """

    own: Params
    shape: TreeShape = struct.field(pytree_node=False, default=PUBLISHED)

    def validate(self, cfg: ModelConfig) -> None:
        if not isinstance(self.own, Mapping) or "unembed" not in self.own:
            raise ValueError(
                f"own is a {type(self.own).__name__}, which must be the heads' "
                "parameters: the second of what `load` returns"
            )
        num_heads, vocab_size, d_model = self.own["unembed"].shape
        check_shape(self.shape, vocab_size)
        vocab_size = cfg.vocab_size if "ids" in self.own else vocab_size
        if (vocab_size, d_model) != (cfg.vocab_size, cfg.d_model):
            raise ValueError(
                f"the heads are for a model of vocab_size={vocab_size} and d_model={d_model}, and "
                f"the target has {cfg.vocab_size} and {cfg.d_model}: train heads for it"
            )
        if self.depth > num_heads:
            raise ValueError(
                f"the tree has depth {self.depth}, more than the {num_heads} heads: use a flatter "
                "one"
            )

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Any:
        """[B, D]."""
        return jnp.zeros((batch_size, cfg.d_model), cfg.jnp_dtype)

    def prefill(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        return self.observe(cfg, context, seen, state)

    def observe(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        index = jnp.maximum(seen.count - 1, 0)[:, None, None]
        last = jnp.take_along_axis(seen.hidden, index, axis=1)[:, 0]
        return jnp.where((seen.count > 0)[:, None], last, state)


def place_cache(cfg: ModelConfig, batch_size: int, num_slots: int) -> KVCache:
    """An empty cache whose slots are for the positions of the same number, in order."""
    cache = init_cache(cfg, batch_size, num_slots)
    if cache.positions is None:
        return cache
    place = jnp.arange(cache.num_slots, dtype=jnp.int32)[None, None, None, :, None]
    return cache.replace(positions=jnp.broadcast_to(place, cache.positions.shape))


def check_fit(
    vocab_size: int, d_model: int, feature_layers: tuple[int, ...], cfg: ModelConfig
) -> None:
    """Raises ValueError unless a network for a target of such sizes goes with the target `cfg`."""
    if (vocab_size, d_model) != (cfg.vocab_size, cfg.d_model):
        raise ValueError(
            f"the network is for a target of vocab_size={vocab_size} and d_model="
            f"{d_model}, and this one has {cfg.vocab_size} and {cfg.d_model}: train one "
            "for it"
        )
    if any(layer > cfg.n_layers for layer in feature_layers):
        raise ValueError(
            f"the network reads layers {feature_layers} of a target that has {cfg.n_layers}: "
            "train one for it"
        )
