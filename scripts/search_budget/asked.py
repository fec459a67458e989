"""What is asked, what a search may know of an answer, and what is right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from decode.core.results import cut
from decode.search.rewards import ProgramTests
from dlm.tasks import Example, countdown, game24
from dlm.tasks.presets import TASKS, TaskPreset
from scripts.search_study.asked import ENDS, asked

Check = Callable[[str, str], float]
Progress = Callable[[str, str, bool], float]
PUZZLES = ("countdown_3", "countdown", "game24")
NAMES = (*PUZZLES, "mbpp")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A task whose answers can be checked before one is given.

    Attributes:
      preset: the task; its scorer says what is right.
      check: of an example: what a search is told of a prompt and a whole answer, in [0, 1].
      progress: of a prompt, the beginning of an answer and whether that is all of it, in [0, 1];
        None: nobody can say.
    """

    preset: TaskPreset
    check: Callable[[Example], Check]
    progress: Progress | None = None


def read(name: str, data: str) -> Asked:
    """A task of `NAMES`; puzzles are checked as they are scored, programs by half of their tests.

    Args:
      name: of the task.
      data: a folder with folders of published files, for programs.

    Raises:
      ValueError: there is no folder, and one is needed.
    """
    if name == "mbpp":
        return Asked(asked(name, data)[0], _public)
    preset = TASKS[name]
    task = preset.make(split="test")

    def check(example: Example) -> Check:
        return lambda prompt, text: task.score(example, text)["score"]

    target = game24.TARGET if name == "game24" else None
    return Asked(preset, check, functools.partial(countdown.progress, target=target))


def _public(example: Example) -> Check:
    """The tests of a program that a search may run."""
    doc = example.metadata
    tests = ProgramTests.public(doc["test_list"], doc["test_setup_code"], has_prompt=False)
    return lambda prompt, text: tests(prompt, text[: cut(text, ENDS["mbpp"])])
