"""EAGLE-3's draft network, which reads three layers of the target and feeds on its own states.

Reference: Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via
Training-Time Test", arXiv:2503.01840, Sec. 3.1, and the public code. In the words of
`dlm.heads.eagle`, with g_t the residual stream of the target at the entrance of three layers:

    u_t = Wfc g_t                                            of true features only
    s_t = u_t + attention([RMSNorm(E(x_{t+1})) ; RMSNorm(u_t)]), then + MLP(RMSNorm(..))
    logits = W' RMSNorm(s_t)                                 W' is its own, for part of the tokens

A published one is read by `load_published`.

Letters: D model width, F MLP width, V vocabulary, U draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlm import vocab
from dlm.blocks.linear import linear
from dlm.blocks.norm import rms_norm
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.eagle import EagleHeads, EagleNetwork, layer_specs
from dlm.heads.published import (
    from_published,
    published_layer,
    read_published,
    to_published,
    write_published,
)
from dlm.lm import LanguageModel
from dlm.params import Params, ParamSpec


class Eagle3Network(EagleNetwork):
    """See above."""

    def begin(self, features: jax.Array) -> jax.Array:
        return linear(features, self.own["fc"])

    def enter(self, embedded: jax.Array, states: jax.Array) -> tuple[jax.Array, jax.Array]:
        eps = self.cfg.norm_eps
        e = rms_norm(embedded, self.own["embed_norm"], eps)
        u = rms_norm(states, self.own["state_norm"], eps)
        return jnp.concatenate([e, u], axis=-1), states

    def normed(self, states: jax.Array) -> jax.Array:
        return rms_norm(states, self.own["final_norm"], self.cfg.norm_eps)

    def head(self, target: Params) -> vocab.Head:
        head: jax.Array = self.own["unembed"]
        return head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle3Heads(EagleHeads):
    """What the network is; also what `train.trainable` trains beside a model.

    Attributes:
      layers: at whose entrance the target is read, three of them, see
        `dlm.models.decoder.forward`; empty: 2, L/2 and L - 3 of a target of L layers, as published,
        or L/4, L/2 and L of one of less than 8.
      vocab: tokens it can draft, or a JSON file with the list of them
        (`python -m scripts.draft_vocab`); empty: all.
    """

    layers: tuple[int, ...] = ()
    vocab: str | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        vocab = self.vocab
        if isinstance(vocab, str):
            vocab = json.loads(pathlib.Path(vocab).read_text(encoding="utf-8")) if vocab else ()
        object.__setattr__(self, "vocab", tuple(sorted(set(vocab))))
        object.__setattr__(self, "layers", tuple(self.layers))
        if self.layers and len(set(self.layers)) != 3:
            raise ValueError(f"layers={self.layers} must be three different ones")
        super().__post_init__()

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens it can draft, ascending; empty: all."""
        assert not isinstance(self.vocab, str)
        return self.vocab

    def feature_layers(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of a target `cfg`; ValueError if it does not have them."""
        L = cfg.n_layers
        chosen = self.layers or ((2, L // 2, L - 3) if L >= 8 else (L // 4, L // 2, L))
        if len(set(chosen)) != 3 or not all(0 <= layer <= L for layer in chosen):
            raise ValueError(
                f"layers={chosen} must be three different ones in [0, n_layers={L}] of the target"
            )
        return chosen

    def specs(self, cfg: ModelConfig) -> Params:
        """Its parameters: a decoder layer with two norms before attention, "fc", and a head."""
        D = cfg.d_model
        self.feature_layers(cfg)
        for token in (*self.ids[:1], *self.ids[-1:]):
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(f"vocab has {token}, not in [0, vocab_size={cfg.vocab_size})")
        norm = ParamSpec((D,), (None,), fill=1.0)
        num_ids = len(self.ids) or cfg.vocab_size
        return layer_specs(self.layer(cfg), 2 * D) | {
            "fc": ParamSpec((3 * D, D), ("embed", None), (3 * D) ** -0.5),
            "embed_norm": norm,
            "state_norm": norm,
            "final_norm": norm,
            "unembed": ParamSpec((num_ids, D), ("vocab", "embed"), D**-0.5),
        }

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh parameters `own`, whose output head becomes the model's."""
        head = vocab.head_weight(params).astype(own["unembed"].dtype)
        norm = params["final_norm"].astype(own["final_norm"].dtype)
        if self.ids:
            head = head[np.asarray(self.ids)]
        return own | {"unembed": head, "final_norm": norm}

    def network(self, cfg: ModelConfig, own: Params) -> Eagle3Network:
        """For a target `cfg`."""
        ids = jnp.asarray(self.ids, jnp.int32) if self.ids else None
        return Eagle3Network(own, ids, self.layer(cfg), self.feature_layers(cfg))


def load(path: str | pathlib.Path, lm: LanguageModel) -> Eagle3Network:
    """A trained network; ValueError if it was trained for another model than `lm`."""
    heads, own = files.load(path, Eagle3Heads, lm)
    return heads.network(lm.cfg, own)


# ---- Published files ---------------------------------------------------------------------------

_TENSORS = published_layer("midlayer") | {
    "fc": "fc.weight",
    "embed_norm": "midlayer.input_layernorm.weight",
    "state_norm": "midlayer.hidden_norm.weight",
    "final_norm": "norm.weight",
    "unembed": "lm_head.weight",
}


def load_published(path: str | pathlib.Path, cfg: ModelConfig) -> Eagle3Network:
    """A network in the layout of the public code, as safetensors.

    The vocabulary is stored as "d2t", what is to be added to a draft token to get the target's. The
    files do not say which layers of the target are read: it is the published ones.

    Args:
      path: the directory.
      cfg: the target.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the target, as EAGLE-1's do not.
    """
    stored = read_published(path, _TENSORS)
    vocab: tuple[int, ...] = ()
    if "d2t" in stored:
        offsets = stored["d2t"].astype(np.int64)
        vocab = tuple((np.arange(len(offsets)) + offsets).tolist())
        if sorted(set(vocab)) != list(vocab):
            raise ValueError(f"{path}: the tokens that d2t stands for must ascend")
        vocab = () if len(vocab) == cfg.vocab_size else vocab
    heads = Eagle3Heads(d_ff=len(stored["mlp/gate"]), vocab=vocab)
    own = from_published(path, stored, _TENSORS, heads.specs(cfg), cfg.jnp_dtype)
    return heads.network(cfg, own)


def save_published(path: str | pathlib.Path, network: Eagle3Network) -> None:
    """Writes what `load_published` reads, into a folder, made if needed."""
    num_tokens = network.cfg.vocab_size
    ids = np.arange(num_tokens) if network.ids is None else np.asarray(network.ids)
    vocab = {
        "d2t": ids.astype(np.int64) - np.arange(len(ids)),
        "t2d": np.isin(np.arange(num_tokens), ids),
    }
    write_published(path, to_published(network.own, _TENSORS) | vocab)
