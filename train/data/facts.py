"""What a task's examples are, in a few characters: so that a run notices that they changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dlm import tasks
from train.config import ConfigError

NUM_SEEN = 256  # examples that are looked at, of a task that does not have them in memory


def describe(task: tasks.Task) -> dict[str, Any]:
    """{"num_examples": n, "sha256": of what is learned from the examples}.

    The digest is of all examples that are in memory, else of `NUM_SEEN` that lie evenly spread.

    Raises:
      ConfigError: an example cannot be read.
    """
    num = len(task)
    seen = range(num) if task.loaded else np.linspace(0, num - 1, min(num, NUM_SEEN)).astype(int)
    digest = hashlib.sha256()
    for index in map(int, seen):
        try:
            example: Any = task[index]
        except ValueError as error:  # a record that does not fit; it is named already
            raise ConfigError(str(error)) from error
        for name, value in sorted(vars(example).items()):
            if name != "metadata":  # what scorers need
                _update(digest, value)
    return {"num_examples": num, "sha256": digest.hexdigest()}


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, entry in sorted(value.items()):
            _update(digest, key)
            _update(digest, entry)
        return
    data = value.encode() if isinstance(value, str) else np.ascontiguousarray(value).tobytes()
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
