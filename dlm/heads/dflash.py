"""DFlash's draft network: a small block-diffusion model whose context is the target's features.

References: Chen et al., "DFlash: Block Diffusion for Flash Speculative Decoding", arXiv:2602.06036,
and the public code; DFlash 2 has no paper, its public code (z-lab) is what is followed. Of several
layers of the target, side by side as g_t, every position t before the root gives one context row

    c_t = RMSNorm(Wfc g_t)

and the network denoises one block in one step: the root and b - 1 MASK tokens, embedded by the
target. In each of its layers the block attends to itself and to the context, whose keys and values
are made of c by the layer's own matrices; positions are true ones. The target's output head is
applied to the block's final states: slot i is about the i-th token after the root. Attention in the
block goes in both directions; published networks may be causal there, and may see only so many
positions.

DFlash 2 has two parts more, which are read from published files. Around attention and around the
MLP, of a sublayer's normalised input h, rows of a block are mixed with those before them:

    x = x + conv(sublayer(conv(h)))
    conv(u)_i = sum_t (base_t + (Wp h)_it) u_{i-t}           nothing before the root

with separate base_t and Wp before and after; Wp h has a number per group of channels. And drafts
are chosen one after the other, among the K tokens of each slot that the head finds best:

    score_i(x) = logit_i(x) + (A[x_{i-1}] * Wh s_i) B[x]     s_i is the final state

Letters: B rows, T positions, D width, L layers of the target, m of the network, n features, b
block length, K key/value heads (or candidates), H head width, V vocabulary, r rank, t taps, G
groups.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
from dlm.lm import LanguageModel
from dlm.params import Params, ParamSpec, param_specs
from dlm.trainable import Learned
from dlm.window import Slots, Window

# Given a layer's number, its reach, its parameters, and queries, keys and values of the block.
Attention = Callable[..., jax.Array]

_SIZES = ("d_ff", "n_heads", "n_kv_heads", "head_dim")  # of the target, unless given


class DFlashNetwork(struct.PyTreeNode):
    """A network that is ready to draft or to be trained.

    Attributes:
      own: its parameters.
      cfg: of its layers; width and vocabulary are the target's. Static.
      feature_layers: what of the target it reads, see `dlm.models.decoder.forward`. Static.
      block_len: b, the root included. Static.
      mask_id: the token that stands for what is to be drafted. Static.
      is_causal: whether positions of the block see no later ones. Static.
      num_candidates: K of DFlash 2, > 0 if there is a "selector" in `own`. Static.
    """

    own: Params
    cfg: ModelConfig = struct.field(pytree_node=False)
    feature_layers: tuple[int, ...] = struct.field(pytree_node=False)
    block_len: int = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)
    is_causal: bool = struct.field(pytree_node=False, default=False)
    num_candidates: int = struct.field(pytree_node=False, default=0)

    @property
    def feature_width(self) -> int:
        """Numbers per position of what it reads."""
        return self.cfg.d_model * len(self.feature_layers)

    def context(self, features: jax.Array) -> jax.Array:
        """c [B, T, D] of features [B, T, n D]."""
        return rms_norm(
            linear(features, self.own["fc"]), self.own["context_norm"], self.cfg.norm_eps
        )

    def keys_values(self, c: jax.Array, positions: jax.Array) -> KVCache:
        """What all layers attend to, a slot per context row of c [B, T, D] at positions [B, T]."""
        angles = rotary_angles(positions, self.cfg)

        def of_layer(p: Params) -> KVCache:
            _, k, v = project_qkv(c, p, self.cfg, angles)
            return KVCache(k=k.swapaxes(1, 2), v=v.swapaxes(1, 2))

        return jax.lax.map(of_layer, self.own["layers"]["attention"])

    def blocks(self, roots: jax.Array) -> jax.Array:
        """Tokens [..., b] int32 of blocks with roots [...]."""
        masks = jnp.full((*roots.shape, self.block_len - 1), self.mask_id, jnp.int32)
        return jnp.concatenate([roots[..., None], masks], axis=-1)

    @property
    def reach(self) -> np.ndarray | None:
        """[m] int32. Layers see only positions less than this away; None: all see all."""
        if self.cfg.sliding_window is None:
            return None
        is_sliding = np.array([kind == "sliding" for kind in self.cfg.kinds("attention")])
        return np.where(is_sliding, self.cfg.sliding_window, 2**30).astype(np.int32)

    def run(
        self, target: Params, tokens: jax.Array, positions: jax.Array, attention: Attention
    ) -> jax.Array:
        """Final states [B, T, D] of blocks side by side; the backward pass computes layers again.

        Args:
          target: the target's parameters, for its embedding.
          tokens: [B, T] int32. T is a multiple of b.
          positions: [B, T] int32.
          attention: what is attended to: [B, T, N, H] of a layer's number, its reach (None: all),
            its parameters, queries [B, T, N, H], keys and values [B, T, K, H].
        """
        cfg = self.cfg
        angles = rotary_angles(positions, cfg)

        def sublayer(
            x: jax.Array, p: Params, name: str, function: Callable[[jax.Array], jax.Array]
        ) -> jax.Array:
            h = rms_norm(x, p[f"{name}_norm"], cfg.norm_eps)
            if (conv := p.get(f"{name}_conv")) is None:
                return x + function(h)
            _, taps, D = conv["base"].shape
            by_block = (x.shape[0], x.shape[1] // self.block_len, self.block_len)
            factors = linear(h, conv["projection"]).reshape(*by_block, 2, taps, -1)
            mix = lambda u, i: _convolve(  # noqa: E731
                u.reshape(*by_block, D), conv["base"][i], factors[..., i, :, :]
            ).reshape(x.shape)
            return x + mix(function(mix(h, 0)), 1)

        def layer(x: jax.Array, at: Any) -> tuple[jax.Array, None]:
            p, i, reach = at

            def attended(h: jax.Array) -> jax.Array:
                q, k, v = project_qkv(h, p["attention"], cfg, angles)
                out = linear(attention(i, reach, p, q, k, v), p["attention"]["o"], num_in=2)
                return out + p["attention"]["o_bias"][None, None] if cfg.o_bias else out

            x = sublayer(x, p, "attention", attended)
            return sublayer(x, p, "mlp", lambda h: mlp(h, p["mlp"])), None

        x = target["embed"].at[tokens].get(mode="clip")
        if cfg.embed_scale != 1:
            x = x * jnp.asarray(cfg.embed_scale, x.dtype)
        reach = None if self.reach is None else jnp.asarray(self.reach)
        at = (self.own["layers"], jnp.arange(cfg.n_layers), reach)
        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, at)
        return rms_norm(x, self.own["final_norm"], cfg.norm_eps)

    def read(self, target: Params, roots: jax.Array, start: jax.Array, cache: KVCache) -> jax.Array:
        """Final states [B, b, D] of the blocks with roots [B] at positions start [B].

        Args:
          target: the target's parameters, for its embedding.
          roots, start: see above.
          cache: of the network; slots below `start` hold the context.
        """
        window = Window.at(self.blocks(roots), start, is_causal=self.is_causal)
        slots = Slots.below(cache, start)
        attention = lambda i, reach, p, q, k, v: attend(  # noqa: E731
            q, k, v, window, slots, i, reach=reach
        )
        return self.run(target, window.tokens, window.positions, attention)

    def logits(self, target: Params, states: jax.Array) -> jax.Array:
        """[.., V] float32 of final states [.., D]."""
        return vocab.logits(*self._product(target, states))

    def best(self, target: Params, states: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The `k` most probable tokens [.., k] int32 of final states [.., D], and log p of each."""
        stats = vocab.read(*self._product(target, states), k=k)
        assert stats.top_tokens is not None and stats.top_log_probs is not None
        return stats.top_tokens, stats.top_log_probs

    def _product(self, target: Params, states: jax.Array) -> tuple[vocab.Head, jax.Array]:
        """The output head, and what it is multiplied with."""
        head: vocab.Head = vocab.head(target)
        if self.cfg.logit_scale != 1:
            states = states * jnp.asarray(self.cfg.logit_scale, states.dtype)
        if self.cfg.logit_cap is not None:
            head = vocab.CappedHead(vocab.head_weight(target), self.cfg.logit_cap)
        return head, states

    def candidates(self, target: Params, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits [.., K] float32 and ids [.., K] int32 of the best tokens of states [.., D]."""
        return jax.lax.top_k(self.logits(target, states), self.num_candidates)

    def edges(self, states: jax.Array, ids: jax.Array, previous: jax.Array) -> jax.Array:
        """[.., K] float32: what is added to the logits of candidates behind a token.

        Args:
          states: [.., D]. Of their slots.
          ids: [.., K] int32.
          previous: [..] int32. The token chosen in the slot before.
        """
        selector = jax.tree.map(lambda x: x.astype(jnp.float32), self.own["selector"])
        asked = selector["predecessor"][previous] * (
            states.astype(jnp.float32) @ selector["hidden"]
        )
        return jnp.einsum("...r,...kr->...k", asked, selector["successor"][ids])


def _convolve(u: jax.Array, base: jax.Array, factors: jax.Array) -> jax.Array:
    """Rows u [B, A, b, D] of blocks, each a sum of it and those before it.

    Args:
      u: see above.
      base: [t, D].
      factors: [B, A, b, t, G]. Added to `base`, one for D / G channels each.
    """
    taps, D = base.shape
    weight = base[None, None, None] + jnp.repeat(factors, D // factors.shape[-1], axis=-1)
    total = weight[..., 0, :] * u
    for t in range(1, taps):
        before = jnp.pad(u[:, :, :-t], ((0, 0), (0, 0), (t, 0), (0, 0)))
        total += weight[..., t, :] * before
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFlashHeads(files.Heads):
    """What the network is; also what `train.trainable` trains beside a model.

    Attributes:
      n_layers: m >= 1 (published: 5).
      layers: at whose entrance the target is read; empty: behind m layers spread evenly from its
        second to its fourth last, as published, or, of a target too small for that, at L/4, L/2
        and L.
      block_len: b >= 2 (published: 16).
      d_ff, n_heads, n_kv_heads, head_dim: >= 0, sizes of its layers; 0: the target's.
      mask_id: >= -1, a token that does not come up in texts; -1: the target's MASK.
    """

    n_layers: int = 5
    layers: tuple[int, ...] = ()
    block_len: int = 16
    d_ff: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    head_dim: int = 0
    mask_id: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        lowest = {"n_layers": 1, "block_len": 2, "mask_id": -1} | dict.fromkeys(_SIZES, 0)
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def feature_layers(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of a target `cfg`; ValueError if it does not have them."""
        L, m = cfg.n_layers, self.n_layers
        spread = tuple(2 + round(i * (L - 4) / max(m - 1, 1)) for i in range(m))
        if len(set(spread)) < m or L < 5:
            spread = tuple(dict.fromkeys((L // 4, L // 2, L)))
        chosen = self.layers or spread
        if len(set(chosen)) < len(chosen) or not all(0 <= layer <= L for layer in chosen):
            raise ValueError(
                f"layers={chosen} must be different ones in [0, n_layers={L}] of the target"
            )
        return chosen

    def specs(self, cfg: ModelConfig) -> Params:
        """Its parameters: {"layers", "final_norm", "fc", "context_norm"}."""
        return network_specs(self._layers(cfg), len(self.feature_layers(cfg)))

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh parameters `own`, whose final norm becomes the model's."""
        return own | {"final_norm": params["final_norm"].astype(own["final_norm"].dtype)}

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model, and the network."""
        return frozen.replace(own=self.network(cfg, own))

    def network(self, cfg: ModelConfig, own: Params) -> DFlashNetwork:
        """For a target `cfg`, with parameters `own`; ValueError if there is no MASK."""
        mask_id = cfg.mask_token_id if self.mask_id < 0 else self.mask_id
        if mask_id is None or mask_id >= cfg.vocab_size:
            raise ValueError(
                f"mask_id={self.mask_id} must be a token in [0, vocab_size={cfg.vocab_size}): the "
                f"target's own MASK is {cfg.mask_token_id}"
            )
        return DFlashNetwork(
            own, self._layers(cfg), self.feature_layers(cfg), self.block_len, mask_id
        )

    def _layers(self, cfg: ModelConfig) -> ModelConfig:
        sizes = {name: getattr(self, name) or getattr(cfg, name) for name in _SIZES}
        return cfg.plain(n_layers=self.n_layers, qk_norm=True, tie_embeddings=True, **sizes)


def network_specs(
    layers: ModelConfig, num_features: int, *, taps: int = 0, groups: int = 0, rank: int = 0
) -> Params:
    """{"layers", "final_norm", "fc", "context_norm"}, and what DFlash 2 has besides.

    Args:
      layers: the network's.
      num_features: n.
      taps, groups: t and G; 0: rows are not mixed.
      rank: r; 0: drafts are not chosen one after the other.
    """
    D, V, m, n = layers.d_model, layers.vocab_size, layers.n_layers, num_features
    own = param_specs(layers)
    specs: Params = {
        "layers": own["layers"],
        "final_norm": own["final_norm"],
        "fc": ParamSpec((n * D, D), ("embed", None), (n * D) ** -0.5),
        "context_norm": ParamSpec((D,), (None,), fill=1.0),
    }
    if taps:
        conv = {
            "base": ParamSpec((m, 2, taps, D), ("layers", None, None, None)),
            "projection": ParamSpec((m, D, 2 * taps * groups), ("layers", "embed", None)),
        }
        specs["layers"] = own["layers"] | {"attention_conv": conv, "mlp_conv": dict(conv)}
    if rank:
        specs["selector"] = {
            "predecessor": ParamSpec((V, rank), ("vocab", None)),
            "successor": ParamSpec((V, rank), ("vocab", None)),
            "hidden": ParamSpec((D, rank), ("embed", None)),
        }
    return specs


def load(path: str | pathlib.Path, lm: LanguageModel) -> DFlashNetwork:
    """A trained network; ValueError if it was trained for another model than `lm`."""
    heads, own = files.load(path, DFlashHeads, lm)
    return heads.network(lm.cfg, own)
