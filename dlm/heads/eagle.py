"""EAGLE's draft network: a decoder layer, or a few, over the target's features.

What both kinds share (`dlm.heads.eagle_1`, `dlm.heads.eagle_3`). A position t of the network is a
pair of the feature f_t, which the target made of x_1 .. x_t, and the token x_{t+1} behind it. Its
state stands for the feature of t + 1, which the target has not made yet, and predicts x_{t+2}:

    s_t = layers(E(x_{t+1}), u_t)        u_t = begin(f_t)
    logits = W norm(s_t)

Where f_t is not known either, further down in a draft, u_t is feed(s_{t-1}), the state itself
unless the network says otherwise. Layers behind the first are those of any decoder.

Letters: B rows, T positions, D model width, V vocabulary, U draft vocabulary, K key/value heads,
H head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from dlm import vocab
from dlm.blocks.attention import attend, project_qkv
from dlm.blocks.linear import linear
from dlm.blocks.mlp import mlp
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotary_angles
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.params import Params, param_specs
from dlm.trainable import Learned
from dlm.window import Slots, Window

Attention = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class EagleNetwork(struct.PyTreeNode):
    """A network that is ready to draft or to be trained.

    Attributes:
      own: its parameters.
      ids: [U] int32, ascending. The tokens it can draft; None: all.
      cfg: of its layers; the vocabulary is the target's. Static.
      feature_layers: what of the target it reads, see `dlm.models.decoder.forward`; empty: the
        final hidden states. Static.
    """

    own: Params
    ids: jax.Array | None
    cfg: ModelConfig = struct.field(pytree_node=False)
    feature_layers: tuple[int, ...] = struct.field(pytree_node=False, default=())

    @property
    def feature_width(self) -> int:
        """Numbers per position of what it reads."""
        return self.target_width * max(len(self.feature_layers), 1)

    @property
    def target_width(self) -> int:
        """Width of the target."""
        return self.cfg.d_model

    @property
    def num_ids(self) -> int:
        """U."""
        return self.cfg.vocab_size if self.ids is None else len(self.ids)

    def begin(self, features: jax.Array) -> jax.Array:
        """[B, T, D] of features [B, T, `feature_width`] in the model's dtype."""
        raise NotImplementedError

    def feed(self, states: jax.Array) -> jax.Array:
        """u [B, T, D] of the next position where there is no feature, of states [B, T, D]."""
        return states

    def embed(self, target: Params, tokens: jax.Array) -> jax.Array:
        """[B, T, D] of tokens [B, T] int32: rows of its own embedding, if it has one."""
        table: jax.Array = self.own["embed"] if "embed" in self.own else target["embed"]
        return table.at[tokens].get(mode="clip")

    @property
    def reach(self) -> tuple[int | None, ...]:
        """Per layer: only keys at positions less than this away are seen; None: all."""
        kinds = self.cfg.kinds("attention")
        return tuple(self.cfg.sliding_window if kind == "sliding" else None for kind in kinds)

    def enter(self, embedded: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What attention reads, and the residual [B, T, D], of embeddings and u [B, T, D]."""
        raise NotImplementedError

    def normed(self, states: jax.Array) -> jax.Array:
        """[B, T, D]. What the output head is multiplied with."""
        raise NotImplementedError

    def head(self, target: Params) -> vocab.Head:
        """[U, D]: rows of the output head, of its own or of the target's parameters."""
        raise NotImplementedError

    def project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries, keys and values of what `enter` gave, at positions [B, T]."""
        return project_qkv(x, self.own["attention"], self.cfg, rotary_angles(positions, self.cfg))

    def leave(self, attended: jax.Array, residual: jax.Array) -> jax.Array:
        """What the first layer gives [B, T, D], of what attention gave [B, T, N, H]."""
        return self._finish(self.own, attended, residual)

    def _finish(self, p: Params, attended: jax.Array, residual: jax.Array) -> jax.Array:
        x = residual + linear(attended, p["attention"]["o"], num_in=2)
        if self.cfg.o_bias:
            x = x + p["attention"]["o_bias"][None, None]
        return x + mlp(rms_norm(x, p["mlp_norm"], self.cfg.norm_eps), p["mlp"])

    def run(
        self, embedded: jax.Array, states: jax.Array, positions: jax.Array, attention: Attention
    ) -> jax.Array:
        """States [B, T, D] of embeddings of x_{t+1} and u_t, both [B, T, D].

        Args:
          embedded, states: see above.
          positions: [B, T] int32. t.
          attention: what is attended to, given a layer's number and its queries [B, T, N, H], keys
            and values [B, T, K, H].
        """
        x, residual = self.enter(embedded, states)
        x = self.leave(attention(0, *self.project(x, positions)), residual)
        angles = rotary_angles(positions, self.cfg)
        for i in range(1, self.cfg.n_layers):
            p = jax.tree.map(lambda leaf, i=i: leaf[i - 1], self.own["more"])
            h = rms_norm(x, p["attention_norm"], self.cfg.norm_eps)
            q, k, v = project_qkv(h, p["attention"], self.cfg, angles)
            x = self._finish(p, attention(i, q, k, v), x)
        return x

    def read(
        self,
        target: Params,
        states: jax.Array,
        window: Window,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the layers over pairs of u_t and x_{t+1} at positions t.

        Args:
          target: the target's parameters, for its embedding.
          states: [B, T, D]. u_t.
          window: x_{t+1} [B, T] int32 as its tokens, t as their positions.
          slots: the layers' cache, if there is one.

        Returns:
          States [B, T, D], and the cache, written if the slots say where.
        """
        news: list[KVCache] = []

        def attention(i: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            news.append(KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2)))
            return attend(q, k, v, window, slots, i, reach=self.reach[i])

        embedded = self.embed(target, window.tokens)
        states = self.run(embedded, states, window.positions, attention)
        if slots is None:
            return states, None
        return states, slots.store(jax.tree.map(lambda *x: jnp.stack(x), *news))

    def logits(self, target: Params, states: jax.Array) -> jax.Array:
        """[B, T, U] float32 of states [B, T, D]."""
        return vocab.logits(self.head(target), self.normed(states))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleHeads(files.Heads):
    """What both kinds share as a `train.trainable`.

    Attributes:
      d_ff: >= 0, width of the network's MLPs; 0: the target's.
    """

    d_ff: int = 0

    def __post_init__(self) -> None:
        if self.d_ff < 0:
            raise ValueError(f"d_ff={self.d_ff} must be at least 0")

    def network(self, cfg: ModelConfig, own: Params) -> EagleNetwork:
        """For a target `cfg`, with parameters `own`."""
        raise NotImplementedError

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model, and the network."""
        return frozen.replace(own=self.network(cfg, own))

    def layer(self, cfg: ModelConfig) -> ModelConfig:
        """The network's one layer."""
        return cfg.plain(n_layers=1, d_ff=self.d_ff or cfg.d_ff)


def layer_specs(cfg: ModelConfig, width: int) -> Params:
    """Specifications of one layer whose attention reads `width` numbers, without a norm of them."""
    stacked = {k: v for k, v in param_specs(cfg)["layers"].items() if k != "attention_norm"}
    layer: Params = jax.tree.map(
        lambda spec: dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:]), stacked
    )
    for name in "qkv":
        spec = layer["attention"][name]
        shape = (*spec.shape[:-1], width)
        layer["attention"][name] = dataclasses.replace(spec, shape=shape, stddev=width**-0.5)
    return layer
