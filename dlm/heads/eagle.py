"""EAGLE's draft network: one decoder layer over the target's features.

What both kinds share (`dlm.heads.eagle_1`, `dlm.heads.eagle_3`). A position t of the network is a
pair of the feature f_t, which the target made of x_1 .. x_t, and the token x_{t+1} behind it. Its
state stands for the feature of t + 1, which the target has not made yet, and predicts x_{t+2}:

    s_t = layer(E(x_{t+1}), u_t)        u_t = begin(f_t)
    logits = W norm(s_t)

Where f_t is not known either, further down in a draft, u_t is the state s_{t-1}.

Letters: B rows, T positions, D model width, V vocabulary, U draft vocabulary, K key/value heads,
H head width.
"""

from __future__ import annotations

import dataclasses

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
from dlm.params import Params, ParamSpec
from dlm.trainable import Learned
from dlm.window import Slots, Window


class EagleNetwork(struct.PyTreeNode):
    """A network that is ready to draft or to be trained.

    Attributes:
      own: its parameters.
      ids: [U] int32, ascending. The tokens it can draft; None: all.
      cfg: of its one layer; widths and vocabulary are the target's. Static.
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
        return self.cfg.d_model * max(len(self.feature_layers), 1)

    @property
    def num_ids(self) -> int:
        """U."""
        return self.cfg.vocab_size if self.ids is None else len(self.ids)

    def begin(self, features: jax.Array) -> jax.Array:
        """[B, T, D] of features [B, T, `feature_width`] in the model's dtype."""
        raise NotImplementedError

    def enter(self, embedded: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What attention reads, and the residual [B, T, D], of embeddings and states [B, T, D]."""
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
        """States [B, T, D] from what attention gave [B, T, N, H]."""
        x = residual + linear(attended, self.own["attention"]["o"], num_in=2)
        return x + mlp(rms_norm(x, self.own["mlp_norm"], self.cfg.norm_eps), self.own["mlp"])

    def read(
        self,
        target: Params,
        states: jax.Array,
        window: Window,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Runs the layer over pairs of u_t and x_{t+1} at positions t.

        Args:
          target: the target's parameters, for its embedding.
          states: [B, T, D]. u_t.
          window: x_{t+1} [B, T] int32 as its tokens, t as their positions.
          slots: the layer's cache, if there is one.

        Returns:
          States [B, T, D], and the cache, written if the slots say where.
        """
        embedded = target["embed"].at[window.tokens].get(mode="clip")
        x, residual = self.enter(embedded, states)
        q, k, v = self.project(x, window.positions)
        states = self.leave(attend(q, k, v, window, slots), residual)
        new = KVCache(k.swapaxes(1, 2)[None], v.swapaxes(1, 2)[None])
        return states, None if slots is None else slots.store(new)

    def logits(self, target: Params, states: jax.Array) -> jax.Array:
        """[B, T, V] float32 of states [B, T, D]; tokens that it cannot draft have -inf."""
        said = vocab.logits(self.head(target), self.normed(states))
        if self.ids is not None:
            num_tokens = target["embed"].shape[0]
            every = jnp.full((*states.shape[:-1], num_tokens), -jnp.inf, said.dtype)
            said = every.at[..., self.ids].set(said)
        return said


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleHeads(files.Heads):
    """What both kinds share as a `train.trainable`.

    Attributes:
      d_ff: >= 0, width of the network's MLP; 0: the target's.
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
    """Specifications of attention over `width` numbers per position, of the MLP and its norm."""
    D, F, N, K, H = cfg.d_model, cfg.d_ff, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    out = 0.3 * 2**-0.5  # as in `dlm.params.param_specs`
    into = lambda heads, axis: ParamSpec((heads, H, width), (axis, None, "embed"), width**-0.5)  # noqa: E731
    return {
        "attention": {
            "q": into(N, "heads"),
            "k": into(K, "kv_heads"),
            "v": into(K, "kv_heads"),
            "o": ParamSpec((N, H, D), ("heads", None, "embed"), out * (N * H) ** -0.5),
        },
        "mlp_norm": ParamSpec((D,), (None,), fill=1.0),
        "mlp": {
            "gate": ParamSpec((D, F), ("embed", "ffn"), D**-0.5),
            "up": ParamSpec((D, F), ("embed", "ffn"), D**-0.5),
            "down": ParamSpec((F, D), ("ffn", "embed"), out * F**-0.5),
        },
    }
