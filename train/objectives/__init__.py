"""What is minimised, one file per method.

An objective is a frozen dataclass, an `Objective`, with one method,

    loss(learned, cfg, batch, context) -> (scalar float32, metrics)

where `learned` is what the run's trainable makes (`dlm.trainable`) and `batch` what `train.data`
does:

    prompt: [B, P] int32. Prompts, left-padded, so that every completion starts at index P.
    prompt_start: [B] int32. Index of the first real prompt token; P if the prompt is empty.
    completion: [B, G] int32. Completions, filled up with EOS.
    completion_len: [B] int32. Tokens of the completion, its first EOS included, at most G.
    index: [B] int32. Which examples of the task these are; of a packed row, its first one.
    segment: [B, G] int32. Only of packed texts that are to be kept apart (`data.keep_apart`, for
        objectives with `keeps_apart`): which text of its row a token is from; prompts are empty.
    step_map: [B, G] int32. Only of trajectories (`train.collect.trajectories`): the round in
        which the teacher decided each position, EOS padding included; -1: never.

A task of `dlm.tasks.Arrays` has its own arrays instead, and "index".

`metrics` is a dict of scalar float32 arrays and holds "loss". A config names an objective by
"module:Class", so a new one is a new file and nothing else.

Those that score single tokens of the model itself are a `TokenObjective`: forward pass and loss
apart. What several objectives share is in `train.reading` and `train.losses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
from flax import struct

from dlm.config import ModelConfig
from dlm.params import Params
from dlm.trainable import Everything, Learned, Trainable


class Context(struct.PyTreeNode):
    """What an objective is told about the step beside the batch.

    Attributes:
      key: of this step, for all its randomness.
      progress: scalar float32 in [0, 1). Share of the steps done, for curricula: the step over
        `optim.decay_steps`.
      is_validation: whether the data are held out; else metrics that cost much may be left out.
        Static.
    """

    key: jax.Array
    progress: jax.Array | float = 0.0
    is_validation: bool = struct.field(pytree_node=False, default=False)


class Predictions(struct.PyTreeNode):
    """Hidden states that predict tokens, and how much each prediction counts.

    Attributes:
      hidden: [B, n, D]. Final hidden states.
      targets: [B, n] int32. The tokens they should predict.
      weight: [B, n] float32. The loss is the sum of weight times cross-entropy; 0: not scored.
      extra: what else the objective's `score` asks for.
    """

    hidden: jax.Array
    targets: jax.Array
    weight: jax.Array
    extra: Any = None


class Objective:
    """What is minimised. Base class of frozen dataclasses.

    Attributes:
      needs_teacher: whether `learned.beside` is to be the moving average of the model
        (`optim.ema_decay`).
      keeps_apart: whether tokens see only those of their "segment", if the batch has segments.
      reads: arrays that a batch must have.
      goes_with: what is learned, as `train.trainable`; None: the model itself.
    """

    needs_teacher: ClassVar[bool] = False
    keeps_apart: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset(
        {"prompt", "prompt_start", "completion", "completion_len"}
    )
    goes_with: ClassVar[type[Trainable] | None] = None

    @classmethod
    def example(cls) -> Self:
        """A small one: what tests of all objectives run."""
        return cls()

    def refuse(self, trainable: Trainable) -> str | None:
        """Why it makes no sense for what is learned, or None."""
        wanted = self.goes_with
        if trainable.is_model if wanted is None else isinstance(trainable, wanted):
            return None
        is_plain = isinstance(trainable, Everything)
        given = "None" if is_plain else type(trainable).__name__
        right = "None or a change to the model" if wanted is None else wanted.__name__
        return f"train.trainable={given} must be {right} with {type(self).__name__} as objective"

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of one batch.

        Args:
          learned: parameters, see `dlm.trainable`.
          cfg: the model that is run.
          batch: as the module says.
          context: of this step.

        Returns:
          Scalar float32, and metrics: scalar float32 by name, "loss" among them.
        """
        raise NotImplementedError

    def for_validation(self) -> Self:
        """What held-out data are judged by.

        Heads and drafters are for what a model writes: of these prompts do not count, also where
        they are learned. What a template puts around every prompt they know by heart.
        """
        replace: Any = dataclasses.replace
        if self.goes_with is not None and getattr(self, "on_prompt", False):
            return cast(Self, replace(self, on_prompt=False))
        return self

    def num_positions(self, batch: Mapping[str, Any]) -> int:
        """Of a batch, padding included: what "tokens_per_s" counts."""
        size: int = batch["prompt"].size + batch["completion"].size
        return size


class TokenObjective(Objective):
    """An objective that is a forward pass, and a score of the tokens it predicts.

    `train.objectives.ps_kd` builds on any of these.
    """

    def predict(
        self, params: Params, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> Predictions:
        """The forward pass on one batch, as the module says; raises ValueError if it cannot be."""
        raise NotImplementedError

    def score(self, params: Params, said: Predictions) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar float32 and metrics of what `predict` returned."""
        raise NotImplementedError

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The score of the target's predictions."""
        return self.score(learned.target, self.predict(learned.target, cfg, batch, context))


def row_mean_weight(is_scored: jax.Array) -> jax.Array:
    """[B, n] float32 weights of a mean over each row's scored tokens, then over rows.

    A row without any counts as 0.
    """
    per_row = jnp.maximum(is_scored.sum(axis=1, keepdims=True), 1)
    return is_scored / (per_row * is_scored.shape[0])
