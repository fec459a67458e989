"""One run of the harness: which tasks there are, and what is written of them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from decode.evaluation.harness import Answerer
from decode.evaluation.task_files import write_local_tasks


def evaluate(
    answerer: Answerer,
    tasks: Sequence[str],
    out: str,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: str = "",
    chat: bool = False,
    data: str = "",
    include: str = "",
) -> str:
    """Runs tasks, writes results, and says them.

    Args:
      answerer: the language model, and how it is asked.
      tasks: their names.
      out: folder for results, samples, task files and what the harness keeps of data.
      limit: examples per task; None: all.
      num_fewshot: shots; None: the task's.
      gen_kwargs: generation settings instead of the tasks'.
      chat: whether prompts go through the chat template.
      data: folder of data sets, see `write_local_tasks`; "": none.
      include: folder of task files; "": none. Without either, tasks are the harness's own.

    Raises:
      ImportError: the harness is not installed.
      ValueError: there is no such task, or a request makes no sense.
    """
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [include] if include else []
    if data:
        write_local_tasks(data, folder / "tasks")
        paths.append(str(folder / "tasks"))
    if paths:  # before the harness is imported, which reads them
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        os.environ.setdefault("HF_HOME", str(folder.resolve() / "cache"))

    from decode.evaluation.lm_eval import HarnessModel  # says what to install, if it must

    model = HarnessModel(answerer)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    manager = TaskManager(include_path=paths, include_defaults=not paths)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        there = ", ".join(sorted(manager.all_tasks)[:20])
        raise ValueError(f"tasks={','.join(unknown)!r} must be among those that there are: {there}")
    results: dict[str, Any] = simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, limit=limit,
        num_fewshot=num_fewshot, gen_kwargs=gen_kwargs or None, apply_chat_template=chat,
        batch_size=answerer.batch_size,
    )  # fmt: skip
    for name, samples in results.pop("samples").items():
        lines = (json.dumps(sample, default=handle_non_serializable) for sample in samples)
        (folder / f"samples_{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    text = json.dumps(results, indent=1, default=handle_non_serializable)
    (folder / "results.json").write_text(f"{text}\n")
    about = ", ".join(f"{name} {value}" for name, value in answerer.about().items())
    return f"{make_table(results)}\n{about}\nWritten: results.json and samples in {folder}/"
