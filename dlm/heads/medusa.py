"""Medusa's heads: guesses about the tokens after the next, from one hidden state.

Reference: Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
Heads", arXiv:2401.10774, Sec. 2.1. Head k (from 1) guesses the token k places behind the one that
the model itself predicts:

    x <- x + silu(W x + b)      once per block; W and b are zero at first
    logits = head_k x           a matrix per head, at first the model's own

so that before training every head says what the model says.

Letters: J heads, R blocks per head, D model width, U draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from dlm import vocab
from dlm.blocks.linear import product
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.draft_vocab import VocabHeads, check_vocab, with_ids
from dlm.lm import LanguageModel
from dlm.params import Params, ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaHeads(VocabHeads):
    """What the heads are; also what `train.trainable` trains beside a model.

    Attributes:
      num_heads: J >= 1.
      num_blocks: R >= 0.
      vocab: tokens they can draft, see `dlm.heads.draft_vocab`; empty: all.
    """

    num_heads: int = 4
    num_blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1 or self.num_blocks < 0:
            raise ValueError(
                f"num_heads={self.num_heads} must be at least 1 and num_blocks={self.num_blocks} 0"
            )

    def specs(self, cfg: ModelConfig) -> Params:
        """{"blocks": R of {"w": [J, D, D], "b": [J, D]}, "unembed": [J, U, D]} of `ParamSpec`."""
        J, D = self.num_heads, cfg.d_model
        check_vocab(self.ids, cfg)
        block = {
            "w": ParamSpec((J, D, D), (None, "embed", None)),
            "b": ParamSpec((J, D), (None, None)),
        }
        return {
            "blocks": [block] * self.num_blocks,
            "unembed": ParamSpec((J, len(self.ids) or cfg.vocab_size, D), (None, "vocab", "embed")),
        }

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Fresh heads `own`, whose matrices become the model's."""
        head = vocab.head_weight(params).astype(own["unembed"].dtype)
        head = head[np.asarray(self.ids)] if self.ids else head
        return own | {"unembed": jnp.broadcast_to(head, own["unembed"].shape)}


def load(path: str | pathlib.Path, lm: LanguageModel) -> tuple[MedusaHeads, Params]:
    """Heads and their parameters; ValueError if they were trained for another model than `lm`.

    The parameters have the tokens that can be drafted as "ids", see `draft_vocab.with_ids`.
    """
    heads, own = files.load(path, MedusaHeads, lm)
    return heads, with_ids(own, heads.ids)


def head_hidden(own: Params, hidden: jax.Array, k: int) -> jax.Array:
    """What head k (from 0) multiplies with its matrix: [..., D] of hidden states [..., D]."""
    x = hidden
    for block in own["blocks"]:
        rows = x.reshape(-1, x.shape[-1])
        x = x + jax.nn.silu(product(rows, block["w"][k], 0) + block["b"][k][None]).reshape(x.shape)
    return x
