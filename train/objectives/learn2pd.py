"""Learn2PD's filter learns which proposals of a block are right, from recorded rounds of decoding.

Reference: Bao et al., "Learning to Parallel", arXiv:2509.25188, Sec. 3.2, and the public code. The
data are what `train.collect.trajectories` records with `oracle`, as `train.collect.records.Rounds`:
the confidences of a block and which proposals were right. The loss is the binary cross-entropy of
sigmoid(o) with them, averaged over all C outputs and all rounds, decided positions included. It is
published with AdamW on all rounds at once (`data.batch_size=0`).

What a model proposes at decided positions does not matter for decoding. A large one repeats the
token that is there, nearly always right. A small one that was trained on masked positions only may
propose anything there: such labels teach the filter nothing and can be left out of the loss
(`decided_weight`). What is reported counts undecided positions only.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import optax

from dlm import lm as lm_lib
from dlm import tasks
from dlm.config import ModelConfig
from dlm.heads.learn2pd import Filter, filter_specs, save_filter
from dlm.params import Params
from dlm.trainable import Learned, Trainable
from train.collect.records import Rounds
from train.objectives import Context, Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterOfRounds(Trainable):
    """The filter, as `train.trainable`: for the model, the blocks and the confidence of the rounds.

    Attributes:
      block_len: >= 0, C; 0: that of the rounds.
      model: `dlm.lm.fingerprint`; "": that of the rounds.
      confidence: name of the component; "": that of the rounds.
    """

    needs_target: ClassVar[bool] = False

    block_len: int = 0
    model: str = ""
    confidence: str = ""

    def __post_init__(self) -> None:
        if self.block_len < 0:
            raise ValueError(f"block_len={self.block_len} must be at least 0")

    def fitted(self, task: tasks.Task) -> Self:
        if not isinstance(task, Rounds):
            raise ValueError(
                f"a filter learns from train.collect.records:Rounds, and data.task.make is "
                f"{type(task).__name__}"
            )
        found: dict[str, Any] = {
            "block_len": task.block_len, "model": task.model, "confidence": task.confidence,
        }  # fmt: skip
        for name, value in found.items():
            if getattr(self, name) not in (value, type(value)()):
                raise ValueError(f"{name}={getattr(self, name)!r} must be {value!r}, the rounds'")
        return dataclasses.replace(self, **found)

    def specs(self, cfg: ModelConfig) -> Params:
        """{"w1": [C, C], "b1": [C], "w2": [C, C], "b2": [C]}; a filter computes in float32."""
        if cfg.dtype != "float32":
            raise ValueError(f"model.dtype={cfg.dtype!r} must be 'float32' for a filter")
        return filter_specs(self.block_len)

    def attach(self, cfg: ModelConfig, frozen: Learned, own: Params) -> Learned:
        return frozen.replace(own=Filter(**own))

    def export(self, folder: pathlib.Path, lm: lm_lib.LanguageModel, own: Params) -> None:
        """Writes `folder/model`, for `dlm.heads.learn2pd.load_filter`."""
        save_filter(folder / "model", Filter(**own, model=self.model, confidence=self.confidence))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learn2PDLoss(Objective):
    """Goes with `train.objectives.learn2pd:FilterOfRounds` as `train.trainable`.

    Attributes:
      decided_weight: in [0, 1], of decided positions in the loss; undecided ones weigh 1
        (published: 1).
      tau: in [0, 1], at which false positives are counted (published: 0.9).
    """

    reads: ClassVar[frozenset[str]] = frozenset({"confidence", "is_right", "undecided"})
    goes_with = FilterOfRounds

    decided_weight: float = 1.0
    tau: float = 0.9

    def __post_init__(self) -> None:
        for name in ("decided_weight", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of rounds. Args: as `Objective`; `own` is a filter.

        Returns:
          Scalar float32, and metrics: "loss". Of held-out data also those of `rates` at `tau`, and
          "decided_wrong", the share of decided positions whose proposal is wrong, whatever the
          filter.
        """
        right, undecided = batch["is_right"], batch["undecided"]
        o = learned.own.logits(batch["confidence"])
        losses = optax.sigmoid_binary_cross_entropy(o, right.astype(o.dtype))
        weight = jnp.where(undecided, 1.0, self.decided_weight).astype(o.dtype)
        loss = (losses * weight).sum() / weight.sum()
        metrics = {"loss": loss}
        if context.is_validation:
            metrics |= rates(jax.nn.sigmoid(o) > self.tau, right, undecided)
            metrics["decided_wrong"] = _share(~right, ~undecided)
        return loss, metrics

    def num_positions(self, batch: Mapping[str, Any]) -> int:
        size: int = batch["confidence"].size
        return size


def rates(keep: jax.Array, is_right: jax.Array, undecided: jax.Array) -> dict[str, jax.Array]:
    """What accepting `keep` makes of undecided positions; all [N, C] bool.

    Returns:
      Scalar float32: "false_positives", the share of wrong proposals that are accepted; "recall",
      the share of right ones that are; "wrong_accepted", the share of accepted ones that are wrong.
    """
    keep = keep & undecided
    return {
        "false_positives": _share(keep, ~is_right & undecided),
        "recall": _share(keep, is_right & undecided),
        "wrong_accepted": _share(~is_right, keep),
    }


def _share(what: jax.Array, among: jax.Array) -> jax.Array:
    """Of those `among`, the share that is `what`, too; 0 if there are none. Scalar float32."""
    return (what & among).sum() / jnp.maximum(among.sum(), 1)
