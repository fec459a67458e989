"""What is asked, and what an answer is worth.

An answer's worth is a row of numbers, of which those of all examples are summed up, and a figure of
the sum: so a mean, and BLEU, which is none, have intervals by the same bootstrap over examples.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from decode.core.results import cut
from decode.evaluation import scoring
from decode.evaluation.diversity import diversity
from decode.evaluation.job import Job
from decode.evaluation.run import device
from dlm.params import num_params
from dlm.tasks import Example, Scorer, Task, bleu, jsonl
from dlm.tasks.passages import Passages
from dlm.tasks.presets import TASKS, TaskPreset
from dlm.tasks.translation import Translation


def _mean(total: np.ndarray) -> float:
    return 100 * float(total[0] / total[1])


@dataclasses.dataclass(frozen=True)
class Quality:
    """What is measured of texts.

    Attributes:
      name: of a column.
      count: [c], of a task, an example and a text.
      value: in [0, 100], of the sum of such rows.
      best: which of the texts of an example is the best; None: there is no saying.
    """

    name: str
    count: Callable[[Task, Example, str], np.ndarray]
    value: Callable[[np.ndarray], float]
    best: Callable[[Task, Example, Sequence[str]], int] | None


def _score(task: Task, example: Example, text: str) -> np.ndarray:
    return np.array([task.score(example, text)["score"], 1.0])


def _best_score(task: Task, example: Example, texts: Sequence[str]) -> int:
    return int(np.argmax([task.score(example, text)["score"] for text in texts]))


SCORE = Quality("score (%)", _score, _mean, _best_score)
BLEU = Quality(
    "BLEU",
    lambda task, example, text: bleu.counts(text, [example.completion]),
    bleu.bleu,
    lambda task, example, texts: bleu.oracle(texts, [example.completion]),
)
DIVERSITY = Quality(
    "diversity (%)",
    lambda task, example, text: np.array([diversity(bleu.words(text)), 1.0]),
    _mean,
    None,
)
FROM_DATA = ("translation", "wikitext2", "humaneval", "mbpp")
NAMES = (*FROM_DATA, *TASKS)


# A searched text is whole; a program in it ends where that of the harness's task would
# (`decode/evaluation/tasks`).
ENDS = {"humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), "mbpp": ("[DONE]",)}


def running(
    passes: Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]], ends: Sequence[str]
) -> Scorer:
    """Whether the program in a text passes its tests; each is run once, in the sandbox.

    Args:
      passes: of `decode.evaluation.scoring`: told a record and programs.
      ends: strings before the first of which a program ends.
    """
    known: dict[tuple[str, str], dict[str, float]] = {}

    def score(example: Example, text: str) -> dict[str, float]:
        program = text[: cut(text, ends)]
        key = example.prompt, program
        if key not in known:
            known[key] = {"score": passes(example.metadata, [program])["pass@1"]}
        return known[key]

    return score


def _code(name: str, data: str) -> Task:
    folder = pathlib.Path(data) / name
    if name == "mbpp":
        score = running(scoring.mbpp, ENDS[name])
        task = jsonl.mbpp(folder / "test_dev.jsonl", folder / "prompt.jsonl")
        return dataclasses.replace(task, scorer=score)
    score = running(scoring.humaneval, ENDS[name])
    return jsonl.JsonlTask(folder / "dev.jsonl", "{prompt}", "{canonical_solution}", score)


def asked(name: str, data: str) -> tuple[TaskPreset, Quality]:
    """A task, and what its answers are worth.

    Args:
      name: of `NAMES`.
      data: a folder with folders of published files, for those of `FROM_DATA`.

    Raises:
      ValueError: there is no folder, and one is needed.
    """
    if name in FROM_DATA and not data:
        raise ValueError(f"--data is missing, the folder whose published files --task={name} reads")
    if name == "translation":
        folder = pathlib.Path(data) / "multi30k"
        return TaskPreset(make=functools.partial(Translation, folder), gen_len=64), BLEU
    if name == "wikitext2":
        file = pathlib.Path(data) / "wikitext2" / "valid.txt"
        return TaskPreset(make=lambda split: Passages(file), gen_len=128), DIVERSITY
    if name in FROM_DATA:
        return TaskPreset(make=lambda split: _code(name, data), gen_len=256), SCORE
    return TASKS[name], SCORE


def about_job(job: Job, task: str, checkpoint: str) -> dict[str, Any]:
    """What stands above results: of which model, on what, where."""
    return {
        "task": task, "checkpoint": checkpoint,
        "parameters": f"{num_params(job.lm.cfg) / 1e6:.1f} M", "dtype": job.lm.cfg.dtype,
        "examples": len(job.examples), "gen_len": job.gen_len, "device": device(),
        "jax": jax.__version__,
    }  # fmt: skip
