"""A smaller model that is trained beside the one it drafts for."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
from flax import struct

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.hf import load_params
from dlm.hf_files import read_config
from dlm.params import Params, param_specs


class Draft(struct.PyTreeNode):
    """The draft model, among the parameters of its target.

    Attributes:
      params: its own.
      cfg: what it is. Static.
    """

    params: Params
    cfg: ModelConfig = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftLM:
    """Goes with `train.objectives.distill_spec` as `train.trainable`.

    Attributes:
      checkpoint: folder of the model to start from, with the target's vocabulary.
    """

    checkpoint: str

    def specs(self, cfg: ModelConfig) -> Params:
        """Those of the draft model; ValueError if its vocabulary is not the target's."""
        return param_specs(self._draft_cfg(cfg))

    def start(self, params: Params, own: Params) -> Params:
        """The weights of the checkpoint."""
        loaded = load_params(self.checkpoint, read_config(self.checkpoint))
        return jax.tree.map(lambda x, fresh: x.astype(fresh.dtype), loaded, own)

    def attach(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """The target's parameters with the draft model beside them."""
        return params | {"draft": Draft(own, self._draft_cfg(cfg))}

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/model`, a model of its own."""
        cfg = self._draft_cfg(lm.cfg)
        params = jax.tree.map(lambda x: x.astype(cfg.jnp_dtype), own)
        lm_lib.save(folder / "model", lm_lib.LanguageModel(params, cfg, lm.tokenizer))

    def _draft_cfg(self, target: ModelConfig) -> ModelConfig:
        cfg = read_config(self.checkpoint)
        if cfg.vocab_size != target.vocab_size:
            raise ValueError(
                f"checkpoint={self.checkpoint!r} has a vocabulary of {cfg.vocab_size} tokens and "
                f"the target one of {target.vocab_size}: they must have the same"
            )
        return cfg
