"""What of a model is learned: all of it, or something small beside it.

A trainable is a frozen dataclass with

    specs(cfg)                 its parameters, a tree of `dlm.params.ParamSpec`
    attach(cfg, params, own)   what the objective is given: the model with it
    export(folder, lm, own)    writes the result of a run

where `params` are those of `train.init_from`, which are never changed, and `own` are the ones that
are learned. There may also be

    start(cfg, params, own)    fresh parameters that follow from the model
    beside(cfg, mesh)          further parameters that stay as they are, added to `params`
    rate(updates)              updates of `own`, some of them scaled

A config names one by "module:Class" (`train.trainable`), for example `dlm.lora:Lora`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Protocol

import jax

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.params import Params, param_specs


class Trainable(Protocol):
    """See above."""

    def specs(self, cfg: ModelConfig) -> Params: ...

    def attach(self, cfg: ModelConfig, params: Params, own: Params) -> Params: ...

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None: ...


@dataclasses.dataclass(frozen=True)
class Everything:
    """All parameters of the model; `params` is not used."""

    def specs(self, cfg: ModelConfig) -> Params:
        return param_specs(cfg)

    def attach(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        return own

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/model`."""
        params = jax.tree.map(lambda x: x.astype(lm.cfg.jnp_dtype), own)
        lm_lib.save(folder / "model", dataclasses.replace(lm, params=params))
