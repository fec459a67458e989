"""Published waiting-line files of ParallelBench, of the same form as `dlm.tasks.waiting_line`.

Reference: Kang et al., "ParallelBench: Understanding the Trade-offs of Parallel Decoding in
Diffusion LLMs", arXiv:2510.04767, and its files.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from dlm import tasks
from dlm.tasks import jsonl
from dlm.tasks.loaded import Loaded
from dlm.tasks.waiting_line import check_operation, parse_list, score_line, with_shots


@dataclasses.dataclass(frozen=True)
class PublishedWaitingLine(Loaded):
    """A published file of one operation, made by `load_parallel_bench`.

    Attributes:
        examples: one per line of the file.
    """

    examples: tuple[tasks.Example, ...]

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """Loose "score" and "score_strict"; see `score_line`."""
        return score_line(example, completion)


def load_parallel_bench(
    path: str | os.PathLike[str], operation: str | None = None, num_shots: int = 1
) -> PublishedWaitingLine:
    """Reads a published waiting-line file and its prompt.

    Args:
        path: a JSON-lines file, next to the `task_config.yaml` of its family.
        operation: one of `OPERATIONS`; by default the file's name without its suffix.
        num_shots: in-context examples to show, at least 0; the published files have one each.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ImportError: PyYAML is not installed.
        ValueError: the operation is unknown, or the files are not of the published form.
    """
    file = pathlib.Path(path)
    operation = file.stem if operation is None else operation
    check_operation(operation)
    if num_shots < 0:
        raise ValueError(f"num_shots={num_shots} must be at least 0")
    template = _published_prompt(file.with_name("task_config.yaml"), operation)
    examples = []
    for number, record in jsonl.read_records(file):
        where = f"{path}, line {number}"
        try:
            shots = record["input"].get("icl_examples", [])[:num_shots]
            examples.append(_published_example(record, shots, operation, template, where))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}: must have 'input' with 'context' and 'answer'; got {error!r}"
            ) from error
        if len(shots) != num_shots:
            raise ValueError(
                f"num_shots={num_shots} must be at most {len(shots)}, the number {where} has"
            )
    return PublishedWaitingLine(tuple(examples))


def _published_prompt(config_path: pathlib.Path, operation: str) -> str:
    """The prompt template of `operation`, found by the entry's key."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            "load_parallel_bench needs PyYAML; install it with: pip install pyyaml"
        ) from error
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{config_path} is missing; it must lie next to the file of examples"
        )
    config = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    for key, entry in config.items():
        if key.rpartition("/")[2] == operation:
            return str(entry["prompt"]).rstrip() + "\n"
    raise ValueError(f"{config_path} must have an entry for {operation!r}; it has {list(config)}")


def _published_example(
    record: dict[str, Any],
    shots: Sequence[dict[str, Any]],
    operation: str,
    template: str,
    where: str,
) -> tasks.Example:
    """One record; an answer is a text or, where many are right, an object with an "example"."""

    def question_and_answer(part: dict[str, Any]) -> tuple[str, str]:
        answer = part["answer"]
        text = answer["example"] if isinstance(answer, dict) else answer
        return jsonl.render(template, part["input"], where), text

    prompt, completion = question_and_answer(record)
    return tasks.Example(
        prompt=with_shots([question_and_answer(shot) for shot in shots], prompt),
        completion=completion,
        metadata={
            "operation": operation,
            "people": tuple(parse_list(record["input"]["context"])),
            "person": record["input"].get("word"),
            "index": record["input"].get("index"),
        },
    )
