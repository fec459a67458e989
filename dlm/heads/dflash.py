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
from collections.abc import Callable, Mapping
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
from dlm.heads.published import (
    from_published,
    one_by_one,
    published_layer,
    read_layers,
    read_network,
    read_published,
    stacked,
    to_published,
    unstacked,
    write_config,
    write_layers,
    write_published,
)
from dlm.hf import keys
from dlm.hf.files import MOST_LAYERS
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


# ---- Published files ---------------------------------------------------------------------------

# What files say of the network, in dflash_config or else beside it, and what it is if they do not.
_SAID: dict[str, Any] = {
    "mask_token_id": None,
    "target_layer_ids": None,
    "block_size": 16,
    "conv_kernel_size": None,
    "conv_group_size": None,
    "selector_rank": None,
    "selector_top_k": None,
    "output_multiplier": 1.0,
    "final_logit_softcapping": None,
    "input_embedding_scale": 1.0,
}
_ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
_WINDOWS = ("causal", "use_swa", "swa_window_size")  # only in dflash_config


def load_published(path: str | pathlib.Path, cfg: ModelConfig) -> DFlashNetwork:
    """A network of DFlash or DFlash 2 in the layout of the public code: config.json, safetensors.

    Where the file does not say whether attention is causal in the block, it is if layers have
    sliding windows, as in the public code.

    Args:
      path: the directory.
      cfg: the target.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the target, or wants what is not implemented; the message names
        file, key and value.
    """
    file, raw = read_network(path)
    about = raw.get("dflash_config") or {}
    if "speculators_model_type" in raw:
        raise ValueError(
            f"{file}: speculators_model_type={raw['speculators_model_type']!r} is not supported; "
            "only the layout of the networks' authors is"
        )
    kinds = raw.get("architectures") or []
    if not isinstance(kinds, list) or any(kind not in _ARCHITECTURES for kind in kinds):
        raise ValueError(
            f"{file}: architectures={kinds!r} is not supported; only "
            f"{', '.join(map(repr, _ARCHITECTURES))} are"
        )
    if not isinstance(about, dict):
        raise ValueError(f"{file}: dflash_config={about!r:.60} must be an object")
    if unknown := [key for key in about if key not in (*_SAID, *_WINDOWS)]:
        raise ValueError(
            f"{file}: dflash_config has {unknown[0]}={about[unknown[0]]!r}, which is not known "
            "here and may change what the network computes; without effect, take it out"
        )
    said = {key: about.get(key, raw.get(key)) for key in _SAID}
    said = {key: _SAID[key] if value is None else value for key, value in said.items()}
    if missing := [key for key in ("mask_token_id", "target_layer_ids") if said[key] is None]:
        raise ValueError(f"{file} must give {missing[0]}, in dflash_config or beside it")
    num_layers = raw.get("num_target_layers")
    if num_layers not in (None, cfg.n_layers):
        raise ValueError(
            f"{file}: num_target_layers={num_layers!r} must be the target's n_layers={cfg.n_layers}"
        )
    network = _read_network(file, raw, about, said, cfg)
    names = _names(network.cfg, network.own)
    stored = read_published(path, names)
    flat = network.own | {"layers": one_by_one(network.own["layers"])}
    own = from_published(path, stored, names, flat, cfg.jnp_dtype)
    return network.replace(own=own | {"layers": stacked(own["layers"])})


def _read_network(
    file: pathlib.Path,
    raw: Mapping[str, Any],
    about: Mapping[str, Any],
    said: Mapping[str, Any],
    cfg: ModelConfig,
) -> DFlashNetwork:
    """With specifications of its parameters in their place."""
    beside = ("architectures", "auto_map", "dflash_config", "num_target_layers", "is_causal")
    of_layers = {key: value for key, value in raw.items() if key not in (*beside, *_SAID)}
    if about.get("use_swa"):
        num_layers = raw.get("num_hidden_layers")
        if "sliding_attention" in str(raw.get("layer_types")):
            raise ValueError(f"{file}: use_swa=True and layer_types both say which layers slide")
        if type(num_layers) is not int or not 1 <= num_layers <= MOST_LAYERS:
            raise ValueError(
                f"{file}: num_hidden_layers={num_layers!r:.60} must be an integer in [1, "
                f"{MOST_LAYERS}]"
            )
        of_layers |= {
            "layer_types": ["sliding_attention"] * num_layers,
            "sliding_window": about.get("swa_window_size"),
            "use_sliding_window": True,
        }
    layers = read_layers(file, of_layers, cfg)
    if layers.d_model != cfg.d_model:
        raise ValueError(
            f"{file}: hidden_size={layers.d_model} must be the target's d_model={cfg.d_model}"
        )
    block_len, W = said["block_size"], layers.sliding_window
    if type(block_len) is not int or block_len < 2:
        raise ValueError(f"{file}: block_size={block_len!r} must be an integer of at least 2")
    if W is not None and block_len > W:
        raise ValueError(f"{file}: sliding_window={W} must be at least block_size={block_len}")
    mask_id = said["mask_token_id"]
    if type(mask_id) is not int or not 0 <= mask_id < cfg.vocab_size:
        raise ValueError(
            f"{file}: mask_token_id={mask_id!r} must be a token in [0, vocab_size={cfg.vocab_size})"
        )
    ids = said["target_layer_ids"]
    is_list = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
    if not is_list or not all(0 <= i < cfg.n_layers for i in ids):
        raise ValueError(
            f"{file}: target_layer_ids={ids!r} must be layers of the target, in [0, n_layers="
            f"{cfg.n_layers})"
        )
    pairs = (("conv_kernel_size", "conv_group_size"), ("selector_rank", "selector_top_k"))
    for pair in pairs:
        given = [said[key] for key in pair]
        if given != [None, None] and any(type(x) is not int or x < 1 for x in given):
            raise ValueError(
                f"{file}: {pair[0]}={given[0]!r} and {pair[1]}={given[1]!r} must be integers of at "
                "least 1, both or none"
            )
    group = said["conv_group_size"] or 1
    if layers.d_model % group:
        raise ValueError(f"{file}: conv_group_size={group} must divide {layers.d_model}")
    if (top := said["selector_top_k"]) is not None and top > cfg.vocab_size:
        raise ValueError(f"{file}: selector_top_k={top} must be at most {cfg.vocab_size}")
    try:
        scales = {
            "embed_scale": keys.number(dict(said), "input_embedding_scale"),
            "logit_scale": keys.number(dict(said), "output_multiplier"),
            "logit_cap": keys.number(dict(said), "final_logit_softcapping") or None,
        }
        layers = dataclasses.replace(layers, tie_embeddings=True, **scales)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    specs = network_specs(
        layers,
        len(ids),
        taps=said["conv_kernel_size"] or 0,
        groups=layers.d_model // group,
        rank=said["selector_rank"] or 0,
    )
    return DFlashNetwork(
        specs,
        layers,
        tuple(i + 1 for i in ids),
        block_len,
        mask_id,
        is_causal=_is_causal(file, raw, about, layers),
        num_candidates=said["selector_top_k"] or 0,
    )


def _is_causal(
    file: pathlib.Path, raw: Mapping[str, Any], about: Mapping[str, Any], layers: ModelConfig
) -> bool:
    """Whether attention in the block is causal."""
    said = {"is_causal": raw.get("is_causal"), "causal": about.get("causal")}
    given = {key: value for key, value in said.items() if value is not None}
    for key, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{file}: {key}={value!r} must be true or false")
    if len(set(given.values())) > 1:
        raise ValueError(
            f"{file}: is_causal={said['is_causal']} and causal={said['causal']} differ"
        )
    if given:
        return next(iter(given.values()))
    if about.get("use_swa"):
        raise ValueError(f"{file}: use_swa=True must come with causal, which it does not imply")
    kinds = set(layers.kinds("attention"))
    if len(kinds) > 1:
        raise ValueError(
            f"{file}: layer_types has sliding and full layers, of which the former would be causal "
            "in the block and the latter not, which is not supported: give is_causal"
        )
    return kinds == {"sliding"}


def save_published(path: str | pathlib.Path, network: DFlashNetwork) -> None:
    """Writes what `load_published` reads, into a folder, made if needed."""
    cfg, own = network.cfg, network.own
    flat = own | {"layers": unstacked(own["layers"])}
    write_published(path, to_published(flat, _names(cfg, own)))
    about: dict[str, Any] = {
        "mask_token_id": network.mask_id,
        "target_layer_ids": [layer - 1 for layer in network.feature_layers],
        "block_size": network.block_len,
        "output_multiplier": cfg.logit_scale,
        "final_logit_softcapping": cfg.logit_cap,
        "input_embedding_scale": cfg.embed_scale,
    }
    kind = "DFlashDraftModel"
    if (conv := own["layers"].get("attention_conv")) is not None:
        _, _, taps, D = conv["base"].shape
        groups = conv["projection"].shape[-1] // (2 * taps)
        about |= {"conv_kernel_size": taps, "conv_group_size": D // groups}
        kind = "DFlash2DraftModel"
    if "selector" in own:
        rank = own["selector"]["hidden"].shape[-1]
        about |= {"selector_rank": rank, "selector_top_k": network.num_candidates}
        kind = "DFlash2DraftModel"
    write_config(
        path,
        write_layers(cfg)
        | {"architectures": [kind], "dflash_config": about, "is_causal": network.is_causal},
    )


def _names(layers: ModelConfig, own: Params) -> dict[str, str]:
    names = {"fc": "fc.weight", "context_norm": "hidden_norm.weight", "final_norm": "norm.weight"}
    for i in range(layers.n_layers):
        prefix = f"layers.{i}"
        of_layer = published_layer(prefix, layers)
        of_layer["attention_norm"] = f"{prefix}.input_layernorm.weight"
        for name in ("attention_conv", "mlp_conv"):
            if name in own["layers"]:
                of_layer[f"{name}/base"] = f"{prefix}.{name}.base_kernel"
                of_layer[f"{name}/projection"] = f"{prefix}.{name}.kernel_projection.weight"
        names |= {f"layers/{i}/{ours}": theirs for ours, theirs in of_layer.items()}
    if "selector" in own:
        names |= {
            "selector/predecessor": "candidate_selector.predecessor_codebook",
            "selector/successor": "candidate_selector.successor_codebook",
            "selector/hidden": "candidate_selector.hidden_projection.weight",
        }
    return names
