"""Measuring decoding methods on held-out examples: the part that `compare` and `study` share."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import dlm
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.generate import collect
from dlm.tasks import Example, Task
from train.config import build

ALL = "all"  # the group of all examples


@dataclasses.dataclass(frozen=True)
class TaskPreset:
    """A task as the configs train on it.

    Attributes:
      spec: for `train.config.build`.
      gen_len: tokens per answer, end-of-text included.
      delimiter: text at whose tokens AdaBlock may end a block; "": none.
      groups: examples reported together, by their operation; None: one group per operation.
    """

    spec: Mapping[str, Any]
    gen_len: int
    delimiter: str = ""
    groups: Mapping[str, Sequence[str]] | None = None


_AT_A_POSITION = ("insert", "remove", "replace")
TASKS = {
    "waiting_line": TaskPreset(
        {"make": "dlm.tasks.waiting_line:WaitingLine", "num_shots": 0},
        gen_len=24,
        delimiter='", "',
        groups={  # sorting belongs to neither
            "one right answer": ("copy", "reverse", *(f"{o}_index" for o in _AT_A_POSITION)),
            "many right answers": ("shuffle", *(f"{o}_random" for o in _AT_A_POSITION)),
        },
    ),
    "word_problems": TaskPreset(
        {"make": "dlm.tasks.word_problems:WordProblems"}, gen_len=24, delimiter=" "
    ),
    "scan": TaskPreset({"make": "dlm.tasks.scan:Scan"}, gen_len=52),
    "countdown": TaskPreset({"make": "dlm.tasks.countdown:Countdown"}, gen_len=48, delimiter=","),
    "sudoku": TaskPreset({"make": "dlm.tasks.sudoku:Sudoku"}, gen_len=24, delimiter="\n"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at one setting.

    Attributes:
      label: its name in tables.
      family: points of one family make a curve.
      method: how to decode.
    """

    label: str
    family: str
    method: DiffusionMethod


@dataclasses.dataclass(frozen=True)
class Job:
    """What all points have in common.

    Attributes:
      lm: the model.
      task: scores answers.
      examples: what is asked.
      prompts: token ids of each.
      groups: indices of the examples per group; the first is `ALL`.
      gen_len, block_len, batch_size: see the flags.
    """

    lm: dlm.LanguageModel
    task: Task
    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    groups: Mapping[str, list[int]]
    gen_len: int
    block_len: int
    batch_size: int


def make_job(
    lm: dlm.LanguageModel,
    preset: TaskPreset,
    *,
    num_examples: int,
    block_len: int,
    gen_len: int = 0,
    batch_size: int = 256,
) -> Job:
    """Held-out examples, in an order of their own, as token ids.

    Raises:
      ValueError: the checkpoint cannot read them, or has no room for them.
    """
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so it cannot read the task's prompts")
    task = build({**preset.spec, "split": "test"}, "task")
    if num_examples > len(task):
        raise ValueError(f"num_examples={num_examples} must be at most {len(task)}, the test split")
    if hasattr(task, "num_examples"):  # a stream: its first ones have all operations equally often
        task = dataclasses.replace(task, num_examples=num_examples)
    order = np.random.default_rng(0).permutation(len(task))[:num_examples]
    examples = [task[int(i)] for i in order]
    prompts = [lm.tokenizer.encode(example.prompt) for example in examples]
    gen_len = gen_len or preset.gen_len
    if (longest := max(map(len, prompts))) + gen_len > lm.cfg.max_seq_len:
        raise ValueError(
            f"prompts of up to {longest} tokens and gen_len={gen_len} are more than the model's "
            f"max_seq_len={lm.cfg.max_seq_len}"
        )
    operations = [example.metadata["operation"] for example in examples]
    named_groups = preset.groups or {o: (o,) for o in sorted(set(operations))}
    groups = {
        group: [i for i, operation in enumerate(operations) if operation in members]
        for group, members in named_groups.items()
    }
    groups = {group: members for group, members in groups.items() if members}
    groups = {ALL: list(range(num_examples))} | (groups if len(groups) > 1 else {})
    batch_size = min(batch_size, num_examples)
    return Job(lm, task, examples, prompts, groups, gen_len, block_len, batch_size)


def measure(job: Job, method: DiffusionMethod, programs: dict[Any, Any]) -> dict[str, Any]:
    """Decodes all examples; per example its score, tokens, forwards and seconds to the first block.

    Args:
      job: what to decode.
      method: how.
      programs: compiled programs and their compile times, by structure; added to.
    """
    lm = job.lm
    found: dict[str, list[float]] = {
        name: [] for name in ("score", "tokens", "forwards", "first_block_s")
    }
    seconds = compile_s = 0.0
    for first in range(0, len(job.prompts), job.batch_size):
        prompts = job.prompts[first : first + job.batch_size]
        state = init_state(
            lm.cfg, method, prompts, gen_len=job.gen_len, seeds=first,
            prompt_len=max(map(len, job.prompts)), batch_size=job.batch_size,
        )  # fmt: skip
        leaves, structure = jax.tree.flatten((method, state))
        key = structure, tuple(map(jax.typeof, leaves))
        if key not in programs:
            start = time.perf_counter()
            compiled = decode.lower(lm.params, lm.cfg, method, state).compile()
            programs[key] = compiled, time.perf_counter() - start
        compiled, compile_s = programs[key]
        jax.block_until_ready(state)
        start = time.perf_counter()
        state = jax.block_until_ready(compiled(lm.params, method, state))
        took = time.perf_counter() - start
        seconds += took
        round_s = took / int(state.num_steps)
        batch = job.examples[first : first + job.batch_size]
        for example, completion in zip(batch, collect(state, lm, len(batch)), strict=True):
            found["score"].append(job.task.score(example, completion.text or "")["score"])
            found["tokens"].append(len(completion.tokens))
            found["forwards"].append(completion.num_forwards)
            rounds = float(completion.step_map[: job.block_len].max()) + 1
            if method.lookahead:  # one forward makes several of them
                passes = 1 if method.guidance is None else 2
                every = int(completion.step_map.max()) + 1
                rounds *= completion.num_forwards / passes / every
            found["first_block_s"].append(rounds * round_s)
    return {"seconds": seconds, "compile_s": compile_s, **found}


def run(job: Job, points: Sequence[Point], log: pathlib.Path) -> list[dict]:
    """Measures each point, unless `log` has it with the same settings. Returns one dict each."""
    same = {
        "task": repr(job.task),
        "checkpoint": dlm.fingerprint(job.lm),
        "num_examples": len(job.examples),
        "gen_len": job.gen_len,
        "block_len": job.block_len,
        "batch_size": job.batch_size,
        "device": device(),
        "jax": jax.__version__,
    }
    measured: dict[str, Any] = {}
    programs: dict[Any, Any] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
            measured[json.dumps(record["settings"])] = record["found"]
        except (ValueError, KeyError):
            continue  # cut short by an interruption, or empty
    keys = [json.dumps(same | {"method": repr(point.method)}) for point in points]
    if num_done := sum(key in measured for key in keys):
        print(f"{num_done} of {len(points)} methods are in {log}; --fresh measures them again")
    for point, key in (bar := tqdm(list(zip(points, keys, strict=True)), unit="method")):
        bar.set_description(point.label)
        if key not in measured:
            measured[key] = measure(job, point.method, programs)
            record = {"settings": json.loads(key), "found": measured[key]}
            with log.open("a") as file:
                file.write(f"\n{json.dumps(record)}\n")  # in front: the last write may be cut short
    return [measured[key] for key in keys]


def bootstrap(values: Any, num: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, examples drawn with replacement."""
    array, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(num)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def device() -> str:
    return f"{jax.devices()[0].device_kind} ({platform.machine()})"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as a table."""
    body = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [" | ".join(map(str.ljust, cells, widths)) for cells in body]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval (Student's t); nan of one seed."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}.get(n, 2.262)
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n)


def with_interval(values: Sequence[float], digits: int) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")
