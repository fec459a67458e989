"""Writes prompts of edits for `python -m scripts.bench spec_bench`: sentences and programs.

    python -m scripts.edit_prompts --data=path/of/data --out=runs/edits
    python -m scripts.bench spec_bench --checkpoint=... --prompts=runs/edits \\
        --drafters=input_guided,suffix

`path/of/data` has the published folders `jfleg`, `asset` and `mbpp`, or some of them; a program and
what it is to become are made from MBPP's (`dlm.tasks.code_edits`). Every line of `question.jsonl`
has `category`, `turns` (one prompt), `reference` and `source`, the text to be edited.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable

from absl import app, flags

from dlm.tasks import Task
from dlm.tasks.code_edits import CodeEdits
from dlm.tasks.rewriting import asset, jfleg

TASKS: dict[str, Callable[[pathlib.Path], Task]] = {
    "jfleg": jfleg,
    "asset": asset,
    "mbpp": lambda folder: CodeEdits(folder / "test_dev.jsonl"),
}


def questions(tasks: dict[str, Task], num: int) -> list[dict[str, object]]:
    """The records of the first examples of every task."""
    found: list[dict[str, object]] = []
    for name, task in tasks.items():
        for i in range(min(num, len(task))):
            example = task[i]
            about = {"category": name, "turns": [example.prompt]}
            right = {"reference": example.completion, "source": example.metadata["source"]}
            found.append({"question_id": len(found), **about, **right})
    return found


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"there are only flags, got {' '.join(argv[1:])}")
    root, out = pathlib.Path(flags.FLAGS.data), pathlib.Path(flags.FLAGS.out)
    try:
        tasks = {name: make(root / name) for name, make in TASKS.items() if (root / name).is_dir()}
        if not tasks:
            raise ValueError(f"--data={root} must have one of the folders {', '.join(TASKS)}")
        found = questions(tasks, flags.FLAGS.num)
        out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(question) + "\n" for question in found)
        (out / "question.jsonl").write_text(lines, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{out / 'question.jsonl'}: {len(found)} prompts of {', '.join(tasks)}")


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder of the data sets.", required=True)
    flags.DEFINE_string("out", None, "Folder for question.jsonl.", required=True)
    flags.DEFINE_integer("num", 100, "Prompts of each data set, the first ones.", lower_bound=1)
    app.run(main)
