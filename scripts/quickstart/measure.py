"""The model, and what every method does with it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

import dlm
from configs import mdlm_waiting_line
from decode.core.results import Completion
from decode.diffusion.components import (
    Eos,
    Factor,
    FixedBlocks,
    Quota,
    Threshold,
    by_name,
)
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.run import answered
from decode.view import Answer
from dlm.tasks import Example
from dlm.tasks.presets import TASKS
from dlm.tasks.waiting_line import OPERATIONS, WaitingLine
from train import loop

PRESET = TASKS["waiting_line"]
GEN_LEN, BLOCK_LEN = PRESET.gen_len, PRESET.block_len  # three blocks: caches have something to keep
ROWS = 32  # decoded at once
REPEATS = 3  # timed runs, whose median counts
RULES = {
    "one per step": Quota(BLOCK_LEN),
    "quota 4": Quota(BLOCK_LEN // 4),
    "threshold 0.9": Threshold(0.9),
    "factor 1.0": Factor(1.0),
}
SHOWN_CACHES = ("none", "prefix", "dual")
BASELINE = ("one per step", "none")
SHOWN = ("reverse", "insert_random", "shuffle")  # operations on the HTML page


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method on all held-out examples.

    Attributes:
      rule: name of the commit rule.
      cache: name of the cache.
      accuracy: exact match per operation, in [0, 1].
      forwards_per_answer: mean.
      tokens_per_forward: tokens up to end-of-text over forwards, all answers together.
      tokens_per_s: the same tokens over the wall time.
      seconds: wall time of all examples, compilation excluded; the median of `REPEATS` runs.
      compile_s: of compiling, or of reading programs from disk; 0 where an earlier rule needed the
        same ones.
      speedup: seconds of one token per step without cache over these.
    """

    rule: str
    cache: str
    accuracy: dict[str, float]
    forwards_per_answer: float
    tokens_per_forward: float
    tokens_per_s: float
    seconds: float
    compile_s: float
    speedup: float = 1.0


def train(workdir: pathlib.Path, smoke: bool) -> tuple[pathlib.Path, WaitingLine]:
    """Trains the model (or finds it trained). Returns it and the held-out examples' task."""
    config = mdlm_waiting_line.get_config("runlocal" if smoke else "")
    result = loop.run(config, workdir / "train")
    if result.model_path is None:
        raise SystemExit("training was interrupted: run the same command again to continue")
    task = config.data.task
    held_out = WaitingLine(
        split="test",
        min_people=task.min_people,
        max_people=task.max_people,
        num_first_names=task.num_first_names,
        num_last_names=task.num_last_names,
        num_shots=task.num_shots,
        num_examples=len(OPERATIONS) * (2 if smoke else 20),
    )
    return result.model_path, held_out


def measure(
    lm: dlm.LanguageModel, task: WaitingLine, examples: list[Example], rule: str, cache: str
) -> tuple[Measurement, list[Completion]]:
    """Decodes all examples in a batch that stays full, and scores them."""
    method = DiffusionMethod(
        scheduler=FixedBlocks(BLOCK_LEN),
        cache=by_name("cache", cache),
        rule=RULES[rule],
        stopper=Eos(),
    )
    assert lm.tokenizer is not None
    prompts = [lm.tokenizer.encode(example.prompt) for example in examples]
    first, *others = (
        answered(lm, method, prompts, gen_len=GEN_LEN, batch_size=ROWS) for _ in range(REPEATS)
    )
    completions = first.completions
    seconds = float(np.median([done.seconds for done in (first, *others)]))
    scores: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for example, completion in zip(examples, completions, strict=True):
        score = task.score(example, completion.text or "")["score"]
        scores[example.metadata["operation"]].append(score)
    num_tokens = sum(len(c.tokens) for c in completions)
    num_forwards = sum(c.num_forwards for c in completions)
    measurement = Measurement(
        rule=rule,
        cache=cache,
        accuracy={operation: float(np.mean(s)) for operation, s in scores.items()},
        forwards_per_answer=num_forwards / len(examples),
        tokens_per_forward=num_tokens / num_forwards,
        tokens_per_s=num_tokens / seconds,
        seconds=seconds,
        compile_s=first.compile_s,
    )
    return measurement, completions


def measure_all(
    lm: dlm.LanguageModel, task: WaitingLine, rules: Sequence[str]
) -> tuple[list[Measurement], list[Answer]]:
    """Some rules with all caches, and their answers to one example of each `SHOWN` operation."""
    examples = [task[i] for i in range(len(task))]
    shown = {operation: i for i, operation in reversed(list(enumerate(OPERATIONS)))}
    measurements: list[Measurement] = []
    answers: list[Answer] = []
    points = [(rule, cache) for rule in rules for cache in SHOWN_CACHES]
    for rule, cache in tqdm(points, desc="decoding", unit="method"):
        measurement, completions = measure(lm, task, examples, rule, cache)
        measurements.append(measurement)
        for operation in SHOWN:
            i = shown[operation]
            score = task.score(examples[i], completions[i].text or "")["score"]
            answers.append(
                Answer(examples[i].prompt, f"{rule}, cache {cache}", completions[i], score == 1)
            )
    base = next(m.seconds for m in measurements if (m.rule, m.cache) == BASELINE)
    return [dataclasses.replace(m, speedup=base / m.seconds) for m in measurements], answers
