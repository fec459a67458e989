"""Hydra's heads: Medusa's, each of which also sees the tokens drafted before it.

Reference: Ankner et al., "Hydra: Sequentially-Dependent Draft Heads for Medusa Decoding",
arXiv:2402.05109, Sec. 3, and the public code. Head i (from 0) guesses the token after the root y_0
and i drafted tokens, from the hidden state c that predicted the root, and the embeddings of all of
them:

    in = [c ; E(y_0) ; .. ; E(y_i)]             (i + 2) D numbers
    x = R in + silu(W in + b)                   W and b are zero at first
    x <- x + silu(W' x + b')                    once per further block
    logits = head_i x                           a matrix per head, at first the model's own

R starts as the selection of c, so that before training every head says what the model says.
Hydra++ has deeper heads (R = 4) and makes c with one more decoder layer over the hidden states of
the text. (The public code lets the blocks behind the first share one matrix; here each has its
own.)

Letters: B rows, T positions, J heads, R blocks per head, D model width, U draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlm import vocab
from dlm.blocks.linear import product
from dlm.blocks.rotary import rotary_angles
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.draft_vocab import VocabHeads, check_vocab, with_ids
from dlm.lm import LanguageModel
from dlm.models.decoder import decoder_layer
from dlm.params import Params, ParamSpec, param_specs
from dlm.window import Slots, Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class HydraHeads(VocabHeads):
    """What the heads are; also what `train.trainable` trains beside a model.

    Attributes:
      num_heads: J >= 1.
      num_blocks: R >= 1.
      has_prefix: whether c is made by a layer of their own (Hydra++).
      vocab: tokens they can draft, see `dlm.heads.draft_vocab`; empty: all.
    """

    num_heads: int = 4
    num_blocks: int = 1
    has_prefix: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1 or self.num_blocks < 1:
            raise ValueError(
                f"num_heads={self.num_heads} and num_blocks={self.num_blocks} must be at least 1"
            )

    def specs(self, cfg: ModelConfig) -> Params:
        """{"first": one dict per head, "blocks": R - 1 dicts, "unembed"} and perhaps "prefix"."""
        J, D = self.num_heads, cfg.d_model
        check_vocab(self.ids, cfg)
        block = {
            "w": ParamSpec((J, D, D), (None, "embed", None)),
            "b": ParamSpec((J, D), (None, None)),
        }
        first = [
            {
                "r": ParamSpec(((i + 2) * D, D), ("embed", None)),
                "w": ParamSpec(((i + 2) * D, D), ("embed", None)),
                "b": ParamSpec((D,), (None,)),
            }
            for i in range(J)
        ]
        specs = {
            "first": first,
            "blocks": [block] * (self.num_blocks - 1),
            "unembed": ParamSpec((J, len(self.ids) or cfg.vocab_size, D), (None, "vocab", "embed")),
        }
        if self.has_prefix:
            specs["prefix"] = param_specs(prefix_config(cfg))["layers"]
        return specs

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh heads `own`, which say what the model says."""
        head = vocab.head_weight(params).astype(own["unembed"].dtype)
        head = head[np.asarray(self.ids)] if self.ids else head
        first = [
            f | {"r": jnp.eye(f["r"].shape[0], f["r"].shape[1], dtype=f["r"].dtype)}
            for f in own["first"]
        ]
        return own | {"first": first, "unembed": jnp.broadcast_to(head, own["unembed"].shape)}


def prefix_config(cfg: ModelConfig) -> ModelConfig:
    """The layer that makes c, as a model of its own: a plain one, with the model's biases."""
    return cfg.plain(n_layers=1, qkv_bias=cfg.qkv_bias, qk_norm=cfg.qk_norm)


def read_prefix(
    own: Params,
    cfg: ModelConfig,
    hidden: jax.Array,
    window: Window,
    slots: Slots | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """c [B, T, D] of hidden states [B, T, D] in a row, and the cache; without "prefix", as given.

    Args:
      own: the heads.
      cfg: the target.
      hidden: see above.
      window: whose tokens do not count: causal, at the positions of the hidden states.
      slots: the layer's cache, if there is one.
    """
    if "prefix" not in own:
        return hidden, None if slots is None else slots.cache
    layer = jax.tree.map(lambda x: x[0], own["prefix"])
    own_cfg = prefix_config(cfg)
    angles = rotary_angles(window.positions, own_cfg)
    hidden, new = decoder_layer(hidden, layer, own_cfg, angles, window, slots)
    return hidden, None if slots is None else slots.store(jax.tree.map(lambda x: x[None], new))


def load(path: str | pathlib.Path, lm: LanguageModel) -> tuple[HydraHeads, Params]:
    """Heads and their parameters; ValueError if they were trained for another model than `lm`.

    The parameters have the tokens that can be drafted as "ids", see `draft_vocab.with_ids`.
    """
    heads, own = files.load(path, HydraHeads, lm)
    return heads, with_ids(own, heads.ids)


def head_hidden(own: Params, inputs: jax.Array, i: int) -> jax.Array:
    """What head i (from 0) multiplies with its matrix.

    Args:
      own: the heads.
      inputs: [..., (i + 2) D]. The hidden state and the embeddings, one behind the other.
      i: which head.

    Returns:
      [..., D].
    """
    first = own["first"][i]
    rows = inputs.reshape(-1, inputs.shape[-1])
    x = product(rows, first["r"], 0) + jax.nn.silu(product(rows, first["w"], 0) + first["b"][None])
    for block in own["blocks"]:
        x = x + jax.nn.silu(product(x, block["w"][i], 0) + block["b"][i][None])
    return x.reshape(*inputs.shape[:-1], -1)
