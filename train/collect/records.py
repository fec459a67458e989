"""Trajectories on disk, as `train.collect.trajectories` writes them, and as tasks to train on."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from dlm import tasks
from dlm.json_lines import read_json

SETTINGS = "settings.json"  # fields of the `TrajectoryConfig` they were made with


@dataclasses.dataclass(frozen=True)
class Trajectories(tasks.Task):
    """What `train.collect.trajectories` wrote, as a task of `tasks.Encoded` to train on.

    Attributes:
      path: the folder.
      split: "train", "valid" or "all": all but the last twentieth, that, or all of them.
      only_right: whether answers with a score below 1 are left out.

    Raises:
      FileNotFoundError: there are none, or they are not complete yet.
      ValueError: the split is unknown, or has no example.
    """

    path: str
    split: str = "train"
    only_right: bool = False
    _kept: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)
    _source: Sequence[dict[str, Any]] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        source = open_records(self.path)
        kept = np.arange(len(source))
        num_valid = max(len(source) // 20, 1)
        parts = {"train": kept[:-num_valid], "valid": kept[-num_valid:], "all": kept}
        if self.split not in parts:
            raise ValueError(f"split={self.split!r} must be one of {', '.join(parts)}")
        kept = parts[self.split]
        if not len(kept):
            raise ValueError(f"{self.path} has {len(source)} trajectories: too few for a split")
        if self.only_right:
            kept = np.array([i for i in kept if source[int(i)]["score"] >= 1], np.int64)
        if not len(kept):
            raise ValueError(f"{self.path}, split {self.split}: no trajectory is right")
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_kept", kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> tasks.Encoded:  # type: ignore[override]
        record = self._source[int(self._kept[index])]
        return tasks.Encoded(record["prompt"], record["completion"], record["step_map"])


@dataclasses.dataclass(frozen=True)
class Rounds(tasks.Task):
    """Rounds that `train.collect.trajectories` recorded with `oracle`, a task of `tasks.Arrays`.

    Attributes:
      path: the folder.
      split: "train", "valid" or "test": rounds of 80 %, 10 % and 10 % of the examples.
      block_len: C of the rounds.
      model: `dlm.lm.fingerprint` of the model that decoded.
      confidence: name of the confidence component.
      arrays: confidence [N, C] float32, is_right [N, C] bool and undecided [N, C] bool of N rounds.

    Raises:
      FileNotFoundError: there are no trajectories, or they are not complete yet.
      ValueError: the split is unknown or empty, or rounds were not recorded.
    """

    path: str
    split: str = "train"
    block_len: int = dataclasses.field(init=False)
    model: str = dataclasses.field(init=False)
    confidence: str = dataclasses.field(init=False)
    arrays: dict[str, np.ndarray] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        source, settings = open_records(self.path), read_settings(self.path)
        if not settings["oracle"]:
            raise ValueError(f"path={self.path!r} has no rounds: collect with oracle=True")
        parts = {"train": range(8), "valid": (8,), "test": (9,)}
        if self.split not in parts:
            raise ValueError(f"split={self.split!r} must be one of {', '.join(parts)}")
        found = [source[i]["rounds"] for i in range(len(source)) if i % 10 in parts[self.split]]
        if not found:
            raise ValueError(f"path={self.path!r} has {len(source)} examples, fewer than 10")
        arrays = {name: np.concatenate([r[name] for r in found]) for name in found[0]}
        object.__setattr__(self, "arrays", arrays)
        object.__setattr__(self, "block_len", arrays["confidence"].shape[1])
        object.__setattr__(self, "model", settings["model"])
        object.__setattr__(self, "confidence", settings["confidence"])

    def __len__(self) -> int:
        return len(self.arrays["confidence"])

    def __getitem__(self, index: int) -> tasks.Arrays:  # type: ignore[override]
        """Of one round."""
        return tasks.Arrays({name: value[index] for name, value in self.arrays.items()})


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of the `TrajectoryConfig` they were made with; "model", the fingerprint of what
    decoded, and "confidence", the name of its confidence component.

    Raises:
      ValueError: an earlier version of this project made them.
    """
    file = pathlib.Path(path) / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the folder holds no trajectories")
    settings = read_json(file)
    if "confidence" not in settings:
        raise ValueError(f"{file} has no 'confidence': collect again, into another folder")
    return settings


def open_records(path: str | os.PathLike[str]) -> Sequence[dict[str, Any]]:
    """The records that were written; FileNotFoundError if they are missing or not complete."""
    if not (pathlib.Path(path) / "dataset_info.json").exists():
        raise FileNotFoundError(
            f"path={str(path)!r} must be a folder that `python -m train.collect.trajectories` "
            "has finished"
        )
    return tfds.builder_from_directory(path).as_data_source("train")
