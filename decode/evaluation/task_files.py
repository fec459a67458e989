"""Task files of lm-evaluation-harness that need no network.

`write_local_tasks` writes those of published data sets that lie in a folder, `export_task` one of
`dlm.tasks`, with its data, so that other models can be asked exactly the same.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import yaml

from dlm.tasks import Example, Task
from dlm.tasks.presets import TASKS

_TEMPLATES = pathlib.Path(__file__).with_name("tasks")
LOCAL = tuple(sorted(file.stem for file in _TEMPLATES.glob("*.yaml")))
NUM_SHOTS = 32  # examples that may be shown


def write_local_tasks(data: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Writes a task file for each data set of `LOCAL` that is there, and copies no data.

    Args:
      data: a folder with folders of these names.
      out: a folder; made if needed.

    Returns:
      Names of the tasks, such as "gsm8k_local".

    Raises:
      FileNotFoundError: none of them is there.
    """
    source, target = pathlib.Path(data).resolve(), pathlib.Path(out)
    there = [name for name in LOCAL if (source / name).is_dir()]
    if not there:
        raise FileNotFoundError(f"{data} has none of the folders {', '.join(LOCAL)}")
    target.mkdir(parents=True, exist_ok=True)
    inside = json.dumps(str(source))[1:-1]  # of a quoted text of YAML, too
    for name in there:
        text = (_TEMPLATES / f"{name}.yaml").read_text(encoding="utf-8")
        text = text.replace("{data}", inside)
        (target / f"{name}.yaml").write_text(text, encoding="utf-8")
    return [f"{name}_local" for name in there]


def export_task(
    name: str, out: str | os.PathLike[str], *, num_examples: int = 200, num_choices: int = 0
) -> None:
    """Writes a task of `dlm.tasks.presets`: NAME.yaml, NAME.test.jsonl and NAME.train.jsonl.

    Texts are scored by the task's own scorer, which needs this package where the harness runs.

    Args:
      name: of `TASKS`.
      out: a folder; made if needed.
      num_examples: of the test split.
      num_choices: 0: texts are to be written; else the right one of so many is to be found, the
        others being right answers to other prompts. The task is then called NAME_choice.

    Raises:
      ValueError: there is no such task, or not so many examples or choices.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    if num_choices and num_choices < 2:
        raise ValueError(f"num_choices={num_choices} must be at least 2, or 0")
    target, called = pathlib.Path(out).resolve(), f"{name}_choice" if num_choices else name
    target.mkdir(parents=True, exist_ok=True)
    files, completions = {}, []
    for split, most in (("train", NUM_SHOTS), ("test", num_examples)):
        task = TASKS[name].make(split=split)
        if split == "test" and not 1 <= num_examples <= len(task):
            raise ValueError(f"num_examples={num_examples} must be in [1, {len(task)}]")
        examples = list(_examples(task, min(most, len(task))))
        completions += [example.completion for example in examples]
        records = [_record(name, example) for example in examples]
        if num_choices:
            records = _with_choices(records, num_choices)
        files[split] = target / f"{called}.{split}.jsonl"
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files[split].write_text("".join(lines), encoding="utf-8")
    config: dict[str, Any] = {
        "task": called,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        "test_split": "test",
        "fewshot_split": "train",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    metrics = ("acc", "acc_norm") if num_choices else ("score",)
    if num_choices:
        config |= {
            "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label",
        }  # fmt: skip
    else:
        stops = [] if any("\n" in completion for completion in completions) else ["\n"]
        config |= {
            "output_type": "generate_until",
            "doc_to_target": "{{completion}}",
            "generation_kwargs": {
                "until": stops, "do_sample": False, "max_gen_toks": TASKS[name].gen_len,
            },
        }  # fmt: skip
    config["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
    ]
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    if not num_choices:
        text += "process_results: !function decode.evaluation.scoring.example\n"
    (target / f"{called}.yaml").write_text(text, encoding="utf-8")


def _examples(task: Task, num: int) -> Iterator[Example]:
    task = task.first(num)
    return (task[i] for i in range(num))


def _record(name: str, example: Example) -> dict[str, Any]:
    """A line of data. Metadata is text: its fields differ from example to example."""
    metadata = json.dumps(dict(example.metadata), default=lambda x: x.item())
    return {
        "task": name,
        "prompt": example.prompt,
        "completion": example.completion,
        "metadata": metadata,
    }


def _with_choices(records: list[dict[str, Any]], num: int) -> list[dict[str, Any]]:
    """With `choices`, and `label`: which of them is right."""
    found = []
    for i, record in enumerate(records):
        rng = np.random.default_rng([0, i])
        others = sorted({other["completion"] for other in records} - {record["completion"]})
        if len(others) < num - 1:
            raise ValueError(
                f"num_choices={num} must be at most {len(others) + 1}: so many answers differ"
            )
        wrong = [others[j] for j in rng.choice(len(others), num - 1, replace=False)]
        label = int(rng.integers(num))
        choices = [*wrong[:label], record["completion"], *wrong[label:]]
        found.append(record | {"choices": choices, "label": label})
    return found
