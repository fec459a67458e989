"""DFlash's draft network: a small block-diffusion model whose context is the target's features.

Reference: Chen et al., "DFlash: Block Diffusion for Flash Speculative Decoding", arXiv:2602.06036,
and the public code. Of several layers of the target, side by side as g_t, every position t before
the root gives one context row

    c_t = RMSNorm(Wfc g_t)

and the network denoises one block in one step: the root and b - 1 MASK tokens, embedded by the
target. In each of its layers the block attends to itself in both directions and to the context,
whose keys and values are made of c by the layer's own matrices; positions are true ones. The
target's output head is applied to the block's final states: slot i is about the i-th token after
the root.

So the network is a transformer of this library, read with bidirectional attention, whose cache is
filled by other means.

Letters: B rows, T positions, D width, L layers of the target, m of the network, n features, b
block length, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
from flax import struct

from dlm.blocks.attention import project_qkv
from dlm.blocks.linear import linear
from dlm.blocks.norm import rms_norm
from dlm.blocks.rotary import rotary_angles
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.published import (
    from_published,
    published_layer,
    read_published,
    to_published,
    write_published,
)
from dlm.hf.files import read_config
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.params import Params, ParamSpec, param_specs
from dlm.tokenizer import read_json
from dlm.trainable import Learned
from dlm.window import Slots, Window

_SIZES = ("d_ff", "n_heads", "n_kv_heads", "head_dim")  # of the target, unless given


class DFlashNetwork(struct.PyTreeNode):
    """A network that is ready to draft or to be trained.

    Attributes:
      own: its parameters.
      cfg: of its layers; width and vocabulary are the target's. Static.
      feature_layers: what of the target it reads, see `dlm.models.decoder.forward`. Static.
      block_len: b, the root included. Static.
      mask_id: the token that stands for what is to be drafted. Static.
    """

    own: Params
    cfg: ModelConfig = struct.field(pytree_node=False)
    feature_layers: tuple[int, ...] = struct.field(pytree_node=False)
    block_len: int = struct.field(pytree_node=False)
    mask_id: int = struct.field(pytree_node=False)

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

    def read(self, target: Params, roots: jax.Array, start: jax.Array, cache: KVCache) -> jax.Array:
        """Final states [B, b, D] of the blocks with roots [B] at positions start [B].

        Args:
          target: the target's parameters, for its embedding.
          roots, start: see above.
          cache: of the network; slots below `start` hold the context.
        """
        params = {
            "embed": target["embed"],
            "layers": self.own["layers"],
            "final_norm": self.own["final_norm"],
        }
        return decoder.forward(
            params,
            self.cfg,
            Window.at(self.blocks(roots), start),
            Slots.below(cache, start),
        ).hidden


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
        D, n = cfg.d_model, len(self.feature_layers(cfg))
        own = param_specs(self._layers(cfg))
        return {
            "layers": own["layers"],
            "final_norm": own["final_norm"],
            "fc": ParamSpec((n * D, D), ("embed", None), (n * D) ** -0.5),
            "context_norm": ParamSpec((D,), (None,), fill=1.0),
        }

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


def load(path: str | pathlib.Path, lm: LanguageModel) -> DFlashNetwork:
    """A trained network; ValueError if it was trained for another model than `lm`."""
    heads, own = files.load(path, DFlashHeads, lm)
    return heads.network(lm.cfg, own)


# ---- Published files ---------------------------------------------------------------------------


def load_published(path: str | pathlib.Path, cfg: ModelConfig) -> DFlashNetwork:
    """A network in the layout of the public code: config.json and safetensors.

    Args:
      path: the directory.
      cfg: the target.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the target, or wants what is not implemented: sliding windows.
    """
    root = pathlib.Path(path)
    file = root / "config.json"
    raw = read_json(file)
    about = raw.get("dflash_config")
    if not isinstance(about, dict) or not {"mask_token_id", "target_layer_ids"} <= set(about):
        raise ValueError(
            f"{file} must have a dflash_config with mask_token_id and target_layer_ids"
        )
    if "sliding_attention" in raw.get("layer_types", ()):
        raise ValueError(f"{file}: layer_types has sliding_attention, which is not implemented")
    of_draft = ("architectures", "auto_map", "block_size", "dflash_config", "num_target_layers")
    of_layers = {key: value for key, value in raw.items() if key not in of_draft}
    layers = read_config(root, dtype=cfg.dtype, raw=of_layers)
    heads = DFlashHeads(
        n_layers=layers.n_layers,
        layers=tuple(layer + 1 for layer in about["target_layer_ids"]),
        block_len=raw.get("block_size") or about.get("block_size", 16),
        d_ff=layers.d_ff,
        n_heads=layers.n_heads,
        n_kv_heads=layers.n_kv_heads,
        head_dim=layers.head_dim,
        mask_id=about["mask_token_id"],
    )
    names = _names(heads.n_layers)
    stored = read_published(root, names)
    specs = heads.specs(cfg)
    of_one = jax.tree.map(lambda x: ParamSpec(x.shape[1:], x.axes[1:]), specs["layers"])
    flat = specs | {"layers": [of_one] * heads.n_layers}
    own = from_published(root, stored, names, flat, cfg.jnp_dtype)
    own["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *own["layers"])
    network = heads.network(cfg, own)
    rotary = {name: getattr(layers, name) for name in ("rope_theta", "rope_scaling", "norm_eps")}
    return network.replace(cfg=dataclasses.replace(network.cfg, **rotary))


def save_published(path: str | pathlib.Path, network: DFlashNetwork) -> None:
    """Writes what `load_published` reads, into a folder, made if needed."""
    cfg, m = network.cfg, network.cfg.n_layers
    layers = [jax.tree.map(lambda x: x[i], network.own["layers"]) for i in range(m)]  # noqa: B023
    write_published(path, to_published(network.own | {"layers": layers}, _names(m)))
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": network.block_len,
        "dflash_config": {
            "mask_token_id": network.mask_id,
            "target_layer_ids": [layer - 1 for layer in network.feature_layers],
        },
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "layer_types": ["full_attention"] * m,
        "max_position_embeddings": cfg.max_seq_len,
        "num_attention_heads": cfg.n_heads,
        "num_hidden_layers": m,
        "num_key_value_heads": cfg.n_kv_heads,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": cfg.dtype,
        "vocab_size": cfg.vocab_size,
        "eos_token_id": cfg.eos_token_id,
    }
    text = json.dumps(config, indent=2) + "\n"
    (pathlib.Path(path) / "config.json").write_text(text, encoding="utf-8")


def _names(num_layers: int) -> dict[str, str]:
    names = {"fc": "fc.weight", "context_norm": "hidden_norm.weight", "final_norm": "norm.weight"}
    for i in range(num_layers):
        of_layer = published_layer(f"layers.{i}") | {
            "attention_norm": f"layers.{i}.input_layernorm.weight",
            "attention/q_norm": f"layers.{i}.self_attn.q_norm.weight",
            "attention/k_norm": f"layers.{i}.self_attn.k_norm.weight",
        }
        names |= {f"layers/{i}/{ours}": theirs for ours, theirs in of_layer.items()}
    return names
