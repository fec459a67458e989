"""A smaller model that is trained beside the one it drafts for."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
from flax import struct
from jax.sharding import Mesh

from dlm import lm as lm_lib
from dlm.config import ModelConfig
from dlm.models.decoder import check_layers
from dlm.params import Params, cast_params, param_specs, stacks
from dlm.trainable import Learned, Trainable


class Draft(struct.PyTreeNode):
    """The draft model.

    Attributes:
      params: its own.
      cfg: what it is. Static.
    """

    params: Params
    cfg: ModelConfig = struct.field(pytree_node=False)


def with_layers(cfg: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    """A model of some layers of another, rising from 0; empty: all. ValueError if it lacks one."""
    if not layers:
        return cfg
    pattern = tuple(cfg.pattern[i % len(cfg.pattern)] for i in check_layers(layers, cfg.n_layers))
    return dataclasses.replace(cfg, n_layers=len(layers), pattern=pattern)


def keep_layers(params: Params, cfg: ModelConfig, layers: tuple[int, ...]) -> Params:
    """Parameters of `with_layers(cfg, layers)`, of those of `cfg`, stacked."""
    if not layers:
        return params
    kept = {}
    for kind, numbers in cfg.stacks.items():
        places = np.array([numbers.index(i) for i in layers if i in numbers], np.int32)
        if len(places):
            kept[kind] = jax.tree.map(lambda x, places=places: x[places], stacks(params, cfg)[kind])
    return params | {"layers": kept if len(kept) > 1 else next(iter(kept.values()))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftLM(Trainable):
    """Goes with `train.objectives.distill_spec` and `adaspec` as `train.trainable`.

    Attributes:
      checkpoint: the model to start from, for `dlm.load`, with the target's vocabulary.
      layers: which of its layers are kept, rising from 0; empty: all. So a draft can be cut from
        the target itself.
      reference: another draft model of the same sizes, which stays as it is, for
        `train.objectives.adaspec`; "": none.
    """

    checkpoint: str
    layers: tuple[int, ...] = ()
    reference: str = ""

    def specs(self, cfg: ModelConfig) -> Params:
        """Those of the draft model; ValueError if its vocabulary is not the target's."""
        return param_specs(self._draft_cfg(cfg))

    def beside(self, cfg: ModelConfig, mesh: Mesh) -> Params | None:
        """The reference, if there is one; ValueError if it is of other sizes."""
        if not self.reference:
            return None
        draft = self._draft_cfg(cfg)
        found = lm_lib.describe(self.reference, dtype=draft.dtype, tokenizer=None).cfg
        if found != draft:
            raise ValueError(
                f"reference={self.reference!r} is {found} and checkpoint={self.checkpoint!r} "
                f"{draft}: they must be alike"
            )
        return lm_lib.load(self.reference, dtype=draft.dtype, tokenizer=None, mesh=mesh).params

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """The weights of the checkpoint, or of what is kept of it."""
        loaded = lm_lib.load(self.checkpoint, tokenizer=None, apart=False)
        kept = keep_layers(loaded.params, loaded.cfg, self.layers)
        return jax.tree.map(lambda x, fresh: x.astype(fresh.dtype), kept, own)

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The target, and the draft model."""
        return frozen.replace(own=Draft(own, self._draft_cfg(cfg)))

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/model`, a model of its own."""
        draft = self._draft(lm.cfg)
        params = cast_params(own, draft.cfg)
        lm_lib.save(
            folder / "model", dataclasses.replace(draft, params=params, tokenizer=lm.tokenizer)
        )

    def _draft_cfg(self, target: ModelConfig) -> ModelConfig:
        return self._draft(target).cfg

    def _draft(self, target: ModelConfig) -> lm_lib.LanguageModel:
        """What the checkpoint says, without weights."""
        draft = lm_lib.describe(self.checkpoint, tokenizer=None)
        if (cfg := draft.cfg).vocab_size != target.vocab_size:
            raise ValueError(
                f"checkpoint={self.checkpoint!r} has a vocabulary of {cfg.vocab_size} tokens and "
                f"the target one of {target.vocab_size}: they must have the same"
            )
        return dataclasses.replace(draft, cfg=with_layers(cfg, self.layers))
