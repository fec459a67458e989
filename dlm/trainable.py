"""What of a model is learned: all of it, or something small beside it.

A `Trainable` is a frozen dataclass that says which parameters are learned, how they begin, and what
a forward pass is made of while they are. A config names one by "module:Class" (`train.trainable`),
for example `dlm.lora:Lora`. Objectives receive what `Trainable.attach` returns, a `Learned`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, ClassVar, Self

import jax
from flax import struct
from jax.sharding import Mesh

from dlm import lm as lm_lib
from dlm import tasks
from dlm.config import ModelConfig
from dlm.params import Params, cast_params, init_from_specs, param_specs


class Learned(struct.PyTreeNode):
    """What a training step computes with.

    Attributes:
      target: parameters of the model that is run: the one that is learned, or the one that
        something is learned beside.
      own: what is learned beside the target, as the objective that goes with it reads it:
        parameters of heads, or a network (`EagleNetwork`, `DFlashNetwork`, `MaskNetwork`, `Draft`,
        `Filter`); None: the target itself is learned.
      beside: parameters of a further model, which stays as it is: the reference of AdaSPEC, the
        model that Medusa-2 began with, or, for an objective with `needs_teacher`, the moving
        average of the target; None: there is none.
    """

    target: Params
    own: Any = None
    beside: Params | None = None


class Trainable:
    """What is learned. Base class of frozen dataclasses; the defaults suit something small.

    Attributes:
      needs_target: whether the objective that goes with it runs the model of `train.init_from`. If
        not, only that model's configuration and tokenizer are read.
      is_model: whether what is learned is the model itself, all of it or a change to it, so that
        `attach` returns nothing as `own`.
    """

    needs_target: ClassVar[bool] = True
    is_model: ClassVar[bool] = False

    def fitted(self, task: tasks.Task) -> Self:
        """This, with what only the training data know; ValueError if they are of another kind."""
        return self

    def specs(self, cfg: ModelConfig) -> Params:
        """Its parameters, a tree of `dlm.params.ParamSpec`, for a model `cfg`."""
        raise NotImplementedError

    def beside(self, cfg: ModelConfig, mesh: Mesh) -> Params | None:
        """Parameters of a further model that stays as it is, spread over `mesh`; None: no model."""
        return None

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """Parameters before the first step.

        Args:
          cfg: the model.
          params: of the model.
          own: fresh ones, drawn as `specs` says.
        """
        return own

    def fresh(self, key: jax.Array, cfg: ModelConfig, params: Params) -> Params:
        """Parameters before the first step, as `start` makes them of some that `key` draws."""
        specs = self.specs(cfg)
        own = jax.jit(lambda key: init_from_specs(key, specs, cfg.jnp_dtype))(key)
        return self.start(cfg, params, own)

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """What the objective is given.

        Args:
          cfg: the model.
          frozen: the model of `train.init_from` as `target` and what `beside` returned; nothing of
            it is changed.
          own: parameters as `specs`, in the model's dtype.
        """
        return frozen.replace(own=own)

    def rate(self, updates: Params) -> Params:
        """Updates of the parameters, some of them perhaps scaled."""
        return updates

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes the result of a run into `folder`; `lm` is the model of `train.init_from`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Everything(Trainable):
    """All parameters of the model; nothing is frozen."""

    is_model: ClassVar[bool] = True

    def specs(self, cfg: ModelConfig) -> Params:
        """Those of the model."""
        return param_specs(cfg)

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model."""
        return Learned(own)

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/model`."""
        params = cast_params(own, lm.cfg)
        lm_lib.save(folder / "model", dataclasses.replace(lm, params=params))
