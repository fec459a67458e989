"""A task that a tiny model learns in seconds, and a config for it; also used by subprocesses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dlm import tasks
from dlm.config import ModelConfig
from dlm.trainable import Learned
from train.objectives import Context, Objective
from train.objectives.masked_diffusion import MaskedDiffusion


@dataclasses.dataclass(frozen=True)
class Copy(tasks.Task):
    """Three letters, to be written down again."""

    split: str = "train"
    num_examples: int = 512
    length: int = 3
    letters: str = "abcdef"

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tasks.Example:
        rng = np.random.default_rng([index, self.split == "test"])
        numbers = rng.integers(len(self.letters), size=self.length)
        letters = "".join(self.letters[i] for i in numbers)
        return tasks.Example(f"{letters}>", letters, {"operation": "copy"})

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        return tasks.exact_match(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        return tuple("abcdef>")


@dataclasses.dataclass(frozen=True)
class Lines(tasks.Task):
    """One to six letters, to be written down again; lines of a file, so to speak."""

    num_examples: int = 64
    has_prompts: bool = True
    too_long: ClassVar[int] = -1  # an example that fits nowhere

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> tasks.Example:
        rng = np.random.default_rng([index, 2])
        letters = "".join("abcdef"[i] for i in rng.integers(6, size=rng.integers(1, 7)))
        if index == self.too_long:
            letters *= 9
        return tasks.Example(f"{letters}>" if self.has_prompts else "", letters, {})

    def where(self, index: int) -> str:
        return f"lines.txt, line {index + 1}"

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        return tasks.exact_match(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        return tuple("abcdef>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diverging(Objective):
    """Masked diffusion whose loss is NaN for one batch in a few, depending on the key."""

    def loss(
        self, learned: Learned, cfg: ModelConfig, batch: Mapping[str, jax.Array], context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, metrics = MaskedDiffusion().loss(learned, cfg, batch, context)
        loss = jnp.where(jax.random.uniform(context.key) < 0.15, jnp.nan, loss)
        return loss, {**metrics, "loss": loss}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Masked diffusion on `Copy`, with a few thousand parameters."""
    del arg
    config = ml_collections.ConfigDict()
    config.model = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 32,
        "max_seq_len": 16,
        "tie_embeddings": True,
        "dtype": "float32",
    }
    config.data = {
        "task": {"make": "tests.lib.toys:Copy", "length": 3},
        "train": {"split": "train"},
        "valid": {"split": "test"},
        "tokenizer": "word",
        "prompt_len": 5,
        "completion_len": 4,
        "batch_size": 8,
        "seed": 0,
    }
    config.optim = {
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "decay_steps": 0,
        "weight_decay": 0.1,
        "accumulate": 1,
        "ema_decay": 0.0,
        "clip_norm": 1.0,
    }
    config.train = {
        "objective": {"make": "train.objectives.masked_diffusion:MaskedDiffusion"},
        "num_steps": 8,
        "seed": 0,
        "init_from": "",
        "eval_every": 4,
        "num_eval_batches": 2,
        "master_dtype": "float32",
    }
    config.checkpoint = {"every": 4, "keep": 2}
    config.log = {"every": 1, "progress": False, "tensorboard": False, "wandb_project": ""}
    config.mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    return config
