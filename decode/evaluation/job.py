"""Measuring diffusion methods on a task's held-out examples."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TypedDict

import jax
import numpy as np
from tqdm import tqdm

from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.run import answered, device
from dlm.lm import LanguageModel, fingerprint
from dlm.tasks import Example, Task
from dlm.tasks.presets import TaskPreset

ALL = "all"  # the group of all examples


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
      gen_len: tokens per answer, end-of-text included.
      block_len: positions per block; of the methods, and of what `first_block_s` means.
      batch_size: rows decoded at once: those that are done make place for the next examples.
    """

    lm: LanguageModel
    task: Task
    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    groups: Mapping[str, list[int]]
    gen_len: int
    block_len: int
    batch_size: int


class Measurement(TypedDict):
    """What decoding all examples gave; the lists have one entry per example.

    Attributes:
      score: in [0, 1], of the task's scorer.
      tokens: up to end-of-text.
      forwards: of the model.
      first_block_s: seconds from when an example got its row until its first block was decided.
      seconds: of decoding.
      compile_s: of compiling.
    """

    score: list[float]
    tokens: list[int]
    forwards: list[int]
    first_block_s: list[float]
    seconds: float
    compile_s: float


def make_job(
    lm: LanguageModel,
    preset: TaskPreset,
    *,
    num_examples: int,
    block_len: int,
    gen_len: int = 0,
    batch_size: int = 32,
) -> Job:
    """Held-out examples, in an order of their own, as token ids.

    Args:
      lm: the model.
      preset: what is asked.
      num_examples: of the task's test split.
      block_len: positions per block.
      gen_len: tokens per answer; 0: the preset's.
      batch_size: rows decoded at once.

    Raises:
      ValueError: the checkpoint cannot read them, or has no room for them.
    """
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so it cannot read the task's prompts")
    task = preset.make(split="test")
    if num_examples > len(task):
        raise ValueError(f"num_examples={num_examples} must be at most {len(task)}, the test split")
    task = task.first(num_examples)  # of a stream, these have all operations equally often
    order = np.random.default_rng(0).permutation(len(task))[:num_examples]
    examples = [task[int(i)] for i in order]
    prompts = [lm.tokenizer.encode(example.prompt, whole=True) for example in examples]
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


def measure(job: Job, method: DiffusionMethod) -> Measurement:
    """Decodes all examples once, in a batch that stays full.

    Args:
      job: what to decode.
      method: how.
    """
    done = answered(job.lm, method, job.prompts, gen_len=job.gen_len, batch_size=job.batch_size)
    found = Measurement(
        score=[], tokens=[], forwards=[], first_block_s=[], seconds=done.seconds,
        compile_s=done.compile_s,
    )  # fmt: skip
    round_s = done.seconds / done.rounds
    for example, completion in zip(job.examples, done.completions, strict=True):
        found["score"].append(job.task.score(example, completion.text or "")["score"])
        found["tokens"].append(len(completion.tokens))
        found["forwards"].append(completion.num_forwards)
        rounds = float(completion.step_map[: job.block_len].max()) + 1
        if method.lookahead:  # one forward makes several of them
            passes = 1 if method.guidance is None else 2
            every = int(completion.step_map.max()) + 1
            rounds *= completion.num_forwards / passes / every
        found["first_block_s"].append(rounds * round_s)
    return found


def measure_points(job: Job, points: Sequence[Point], log: pathlib.Path) -> list[Measurement]:
    """Measures each point, unless `log` has it with the same settings.

    Args:
      job: what all points decode.
      points: what is measured.
      log: JSON lines, to which every point is appended as it finishes; it need not be there yet.

    Returns:
      What `measure` returns, per point.
    """
    same = {
        "task": repr(job.task),
        "checkpoint": fingerprint(job.lm),
        "dtype": job.lm.cfg.dtype,
        "num_examples": len(job.examples),
        "gen_len": job.gen_len,
        "block_len": job.block_len,
        "batch_size": job.batch_size,
        "device": device(),
        "jax": jax.__version__,
    }
    measured: dict[str, Measurement] = {}
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
            measured[key] = measure(job, point.method)
            record = {"settings": json.loads(key), "found": measured[key]}
            with log.open("a") as file:
                file.write(f"\n{json.dumps(record)}\n")  # in front: the last write may be cut short
    return [measured[key] for key in keys]
