"""A model and Medusa's heads that are trained together (Medusa-2).

Reference: Cai et al., arXiv:2401.10774, Sec. 2.2.2; the heads are `dlm.heads.medusa`. What comes
out is another model, whose own text the heads draft.
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax

from dlm.config import ModelConfig
from dlm.heads import files
from dlm.heads.medusa import MedusaHeads, load
from dlm.lm import LanguageModel, save
from dlm.params import Params, cast_params, param_specs
from dlm.trainable import Learned, Trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaJoint(Trainable):
    """Goes with `train.objectives.medusa_2:Medusa2Loss` as `train.trainable`.

    Attributes:
      num_heads: J >= 1.
      num_blocks: R >= 0.
      heads: folder of heads that were trained beside the model, to start from (published: so);
        "": fresh ones.
      model_rate: of the model's learning rate to the heads', >= 0 (published: 1/4).
    """

    num_heads: int = 4
    num_blocks: int = 1
    heads: str = ""
    model_rate: float = 0.25

    def __post_init__(self) -> None:
        if not self.model_rate >= 0:
            raise ValueError(f"model_rate={self.model_rate} must be at least 0")
        _ = self._heads  # which refuses what it cannot be

    @property
    def _heads(self) -> MedusaHeads:
        return MedusaHeads(num_heads=self.num_heads, num_blocks=self.num_blocks)

    def specs(self, cfg: ModelConfig) -> Params:
        """{"model", "heads"}."""
        return {"model": param_specs(cfg), "heads": self._heads.specs(cfg)}

    def start(self, cfg: ModelConfig, params: Params, own: Params) -> Params:
        """The model's own parameters, and heads that say what it says, or those of `heads`."""
        if self.heads:
            trained, heads = load(self.heads, LanguageModel(params, cfg, None))
            if trained != self._heads:
                raise ValueError(f"heads={self.heads!r} holds {trained}, not {self._heads}")
        else:
            heads = self._heads.start(cfg, params, own["heads"])
        given = {"model": params, "heads": heads}
        return jax.tree.map(lambda x, fresh: x.astype(fresh.dtype), given, own)

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        """The model as it is now, its heads, and beside them the model as it was."""
        return Learned(own["model"], own["heads"], frozen.target)

    def rate(self, updates: Params) -> Params:
        """Updates at the two learning rates."""
        slower = jax.tree.map(lambda x: self.model_rate * x, updates["model"])
        return updates | {"model": slower}

    def export(self, folder: pathlib.Path, lm: LanguageModel, own: Params) -> None:
        """Writes `folder/model`, a model, and `folder/heads`, for `dlm.heads.medusa.load`."""
        model = cast_params(own["model"], lm.cfg)
        heads = jax.tree.map(lambda x: x.astype(lm.cfg.jnp_dtype), own["heads"])
        tuned = dataclasses.replace(lm, params=model)
        save(folder / "model", tuned)
        files.save(folder / "heads", self._heads, tuned, heads)
