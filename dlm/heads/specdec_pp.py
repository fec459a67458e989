"""SpecDec++'s head: how likely a draft is accepted, from what the draft model makes of it.

Reference: Huang et al., "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths",
arXiv:2405.19715, Sec. 3.2, and the public code. Of the draft model's final hidden state at a draft,
normalised,

    x <- x + silu(W x + b)      once per block; fresh weights are drawn, not zero
    (log P(rejected), log P(accepted)) = log_softmax(W' x + b')

The public code repeats one block; here each has weights of its own, as in the publication.

Letters: R blocks, D width of the draft model.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.heads import files
from dlm.params import Params, ParamSpec
from dlm.trainable import Learned


class Judged(struct.PyTreeNode):
    """A head in training.

    Attributes:
      params: its own.
      target: the model that judges. Static.
    """

    params: Params
    target: ModelConfig = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopHead(files.Heads):
    """What the head is; also what `train.trainable` trains beside the draft model.

    Attributes:
      target: the model that judges the drafts, for `dlm.load`, with the draft model's vocabulary;
        only training asks for it.
      num_blocks: R >= 0 (published: 3).
    """

    target: str = ""
    num_blocks: int = 3

    def __post_init__(self) -> None:
        if self.num_blocks < 0:
            raise ValueError(f"num_blocks={self.num_blocks} must be at least 0")

    def specs(self, cfg: ModelConfig) -> Params:
        """{"blocks": R of {"w": [D, D], "b": [D]}, "w": [D, 2], "b": [2]} of `ParamSpec`.

        Fresh ones have the variance of the public code's layers, 1 / (3 D), but are normal.
        """
        D = cfg.d_model
        stddev = (3 * D) ** -0.5
        block = {
            "w": ParamSpec((D, D), ("embed", None), stddev),
            "b": ParamSpec((D,), (None,), stddev),
        }
        return {
            "blocks": [block] * self.num_blocks,
            "w": ParamSpec((D, 2), ("embed", None), stddev),
            "b": ParamSpec((2,), (None,), stddev),
        }

    def beside(self, cfg: ModelConfig, mesh: Mesh) -> Params:
        """The target; ValueError if there is none, or its vocabulary is not the draft model's."""
        target = self._target_cfg(cfg)
        return lm_lib.load(self.target, dtype=target.dtype, tokenizer=None, mesh=mesh).params

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The draft model as target of the run, the head, and the model that judges beside them."""
        return frozen.replace(own=Judged(own, self._target_cfg(cfg)))

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/model`, for `load`."""
        files.save(folder / "model", dataclasses.replace(self, target=""), lm, own)

    def _target_cfg(self, draft: ModelConfig) -> ModelConfig:
        if not self.target:
            raise ValueError("target='' must be the folder of the model that judges the drafts")
        cfg = lm_lib.describe(self.target, tokenizer=None).cfg
        if cfg.vocab_size != draft.vocab_size:
            raise ValueError(
                f"target={self.target!r} has a vocabulary of {cfg.vocab_size} tokens and the draft "
                f"model one of {draft.vocab_size}: they must have the same"
            )
        return cfg


def load(path: str | pathlib.Path, draft: lm_lib.LanguageModel) -> tuple[StopHead, Params]:
    """A head and its parameters; ValueError if it was trained for another draft model."""
    return files.load(path, StopHead, draft)


def log_verdict(own: Params, hidden: jax.Array) -> jax.Array:
    """[..., 2] float32: log-probabilities of rejection and acceptance.

    Args:
      own: the head's parameters.
      hidden: [..., D]. Final hidden states of the draft model at drafts.
    """
    x = hidden.reshape(-1, hidden.shape[-1])
    for block in own["blocks"]:
        x = x + jax.nn.silu(x @ block["w"] + block["b"][None])
    logits = (x @ own["w"] + own["b"][None]).astype(jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1).reshape(*hidden.shape[:-1], 2)
