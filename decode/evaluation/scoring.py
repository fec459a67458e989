"""Scorers that task files of lm-evaluation-harness name: `!function decode.evaluation.scoring.x`.

Each is told a record of the data and the texts that were written for it, of which there is one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from decode.evaluation.sandbox import run_program
from dlm.tasks import Example, Task
from dlm.tasks.presets import TASKS

_SHOTS = (1, 2, 3)  # of the prompt split: tasks 2 to 4, as the harness's own `mbpp` has them


def humaneval(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the function that a text completes passes its tests."""
    return _passes(doc["prompt"] + results[0], doc["test"], f"check({doc['entry_point']})")


def mbpp(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether a program passes its tests."""
    return _passes(results[0], doc["test_setup_code"], *doc["test_list"])


def mbpp_shots(dataset: Any) -> Any:
    """The tasks of a data set that are shown as examples."""
    return dataset.select(_SHOTS)


def example(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The score of one of `dlm.tasks`, exported by `decode.evaluation.task_files`."""
    asked = Example(doc["prompt"], doc["completion"], json.loads(doc["metadata"]))
    return {"score": _task(doc["task"]).score(asked, results[0])["score"]}


@functools.cache
def _task(name: str) -> Task:
    return TASKS[name].make(split="test")


def _passes(*parts: str) -> dict[str, float]:
    return {"pass@1": float(run_program("\n".join(parts)).is_passed)}
