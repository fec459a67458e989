"""Trains a small masked-diffusion model, then decodes with every method, side by side.

    python -m scripts.quickstart --workdir=runs/quickstart

The task is ParallelBench's waiting line (arXiv:2510.04767): ten operations on lists of people. On
copy, reverse, remove and replace at a position each token of the answer follows from the prompt, so
committing many at once loses nothing; on shuffle and the random ones many answers are right, and
tokens committed together may belong to different ones.

Writes into the workdir: model/ (for `dlm.load`), results.json, results.csv, speed_quality.png,
commit_order.html. Running it again continues interrupted training, and skips it if it is done.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
from absl import app, flags, logging
from tqdm import tqdm

import dlm
from configs import mdlm_waiting_line
from decode.diffusion.components import (
    CACHES,
    EntropyThreshold,
    Eos,
    Factor,
    FixedBlocks,
    Quota,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.figures import OperatingPoint, plot_speed_quality
from decode.evaluation.run import device, timed
from decode.generate import Completion
from decode.view import Answer, write_commit_order
from dlm.tasks import Example
from dlm.tasks.waiting_line import OPERATIONS, WaitingLine
from train import loop
from train.host import keep_freed_memory

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for everything written.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A few training steps and answers: does it run?")

GEN_LEN = 24  # tokens; as trained
BLOCK_LEN = 8  # three blocks, so that caches have something to keep
RULES = {
    "one per step": Quota(BLOCK_LEN),
    "quota 2": Quota(BLOCK_LEN // 2),
    "quota 4": Quota(BLOCK_LEN // 4),
    "threshold 0.9": Threshold(0.9),
    "factor 1.0": Factor(1.0),
    "entropy 0.5": EntropyThreshold(0.5),
}
SHOWN_CACHES = ("none", "prefix", "dual")
BASELINE = ("one per step", "none")
SHOWN = ("reverse", "insert_random", "shuffle")  # operations on the HTML page
ONE_ANSWER = ("copy", "reverse", "insert_index", "remove_index", "replace_index")
MANY_ANSWERS = ("shuffle", "insert_random", "remove_random", "replace_random")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One method on all held-out examples.

    Attributes:
      rule: name of the commit rule.
      cache: name of the cache.
      accuracy: exact match per operation, in [0, 1].
      forwards_per_answer: mean.
      tokens_per_forward: tokens up to end-of-text over forwards, all answers together.
      tokens_per_s: the same tokens over the wall time of the batch.
      seconds: wall time of the batch, compilation excluded.
      compile_s: compilation.
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
    """Decodes all examples as one batch and scores them."""
    method = DiffusionMethod(
        scheduler=FixedBlocks(BLOCK_LEN), cache=CACHES[cache](), rule=RULES[rule], stopper=Eos()
    )
    assert lm.tokenizer is not None
    prompts = [lm.tokenizer.encode(example.prompt) for example in examples]
    done = timed(lm, method, prompts, gen_len=GEN_LEN)
    completions, seconds = done.completions, done.seconds
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
        compile_s=done.compile_s,
    )
    return measurement, completions


def table(measurements: list[Measurement]) -> str:
    """The measurements as a Markdown table; accuracies in per cent."""
    short = [operation.replace("_", " ").replace("index", "at") for operation in OPERATIONS]
    header = ["rule", "cache", *short, "forwards", "tok/fwd", "tok/s", "speed-up"]
    rows = [
        [
            m.rule,
            m.cache,
            *(f"{100 * m.accuracy[operation]:.0f}" for operation in OPERATIONS),
            f"{m.forwards_per_answer:.1f}",
            f"{m.tokens_per_forward:.2f}",
            f"{m.tokens_per_s:.0f}",
            f"{m.speedup:.1f}x",
        ]
        for m in measurements
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def write(
    workdir: pathlib.Path,
    measurements: list[Measurement],
    answers: list[Answer],
    lm: dlm.LanguageModel,
    num_examples: int,
) -> None:
    """Results, picture and page."""
    about = {
        "device": device(),
        "dtype": lm.cfg.dtype,
        "batch": num_examples,
        "gen_len": GEN_LEN,
        "block_len": BLOCK_LEN,
        "jax": jax.__version__,
    }
    rows = [dataclasses.asdict(m) for m in measurements]
    (workdir / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    with (workdir / "results.csv").open("w", newline="") as file:
        flat = [row | row.pop("accuracy") for row in rows]
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)

    def panel(operations: tuple[str, ...]) -> list[OperatingPoint]:
        return [
            OperatingPoint(
                method=m.rule,
                setting=f"cache: {m.cache}",
                speed=m.tokens_per_forward,
                quality=float(np.mean([m.accuracy[o] for o in operations])),
            )
            for m in measurements
        ]

    plot_speed_quality(
        workdir / "speed_quality.png",
        {
            "one right answer (copy, reverse, ... at)": panel(ONE_ANSWER),
            "many right answers (shuffle, ... random)": panel(MANY_ANSWERS),
        },
        "Waiting line: quality against parallelism",
    )
    assert lm.tokenizer is not None
    write_commit_order(
        workdir / "commit_order.html", answers, lm.tokenizer, "Waiting line: order of decoding"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX have much to say
    keep_freed_memory()
    workdir = pathlib.Path(_WORKDIR.value)
    start = time.perf_counter()
    model_path, task = train(workdir, _SMOKE.value)
    trained = time.perf_counter()
    lm = dlm.load(model_path)
    examples = [task[i] for i in range(len(task))]
    shown = {operation: i for i, operation in reversed(list(enumerate(OPERATIONS)))}

    measurements: list[Measurement] = []
    answers: list[Answer] = []
    rules = ("one per step", "threshold 0.9") if _SMOKE.value else tuple(RULES)
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
    measurements = [dataclasses.replace(m, speedup=base / m.seconds) for m in measurements]
    write(workdir, measurements, answers, lm, len(examples))

    done = time.perf_counter()
    print(f"\nexact match in % on {len(examples)} held-out lines, one batch, {lm.cfg.dtype}, "
          f"gen_len {GEN_LEN}, block {BLOCK_LEN}, {jax.devices()[0].device_kind}:\n")  # fmt: skip
    print(table(measurements))
    print(f"\ntraining {trained - start:.0f} s, decoding {done - trained:.0f} s. Written:")
    for name in ("speed_quality.png", "commit_order.html", "results.json", "results.csv"):
        print(f"  {workdir / name}")
    print("\nYour own line, with the model just trained:\n"
          f"  python -m scripts.ask --checkpoint={model_path} --operation=reverse "
          '--people="Alice Young, Oscar Rivera, Zoe Parker"')  # fmt: skip


if __name__ == "__main__":
    app.run(main)
