"""Decodes the same held-out examples with many methods: one table, one figure, AUP per family.

    python -m scripts.compare --task=waiting_line --checkpoint=runs/quickstart/train/model
    python -m scripts.compare ... --methods=threshold,threshold_0.7,local_leap
    python -m scripts.compare ... --methods_file=mine.yaml

Methods are those of `decode/methods.py` (default: all). A methods file (.yaml, .json, or .py with
`get_config()`) is a list, or has one under "methods", of points that change fields of them:

    - {name: threshold, label: threshold 0.8, rule: {threshold: 0.8}, scheduler: {block_len: 16}}
    - {name: klass, family: klass dual, cache: dual}

`one_per_step`, the baseline of speed-ups, is always measured. Writes into `--out`: results.json,
results.csv, speed_quality.png, and measured.jsonl, to which each point is appended as it finishes:
a rerun skips what was measured with the same settings. Columns (`summarise` computes them):

    accuracy       per cent, with a bootstrap 95 % interval over examples
    NFE            forwards per answer, with such an interval
    tokens/fwd     tokens up to end-of-text over forwards, all answers together
    tokens/s       the same tokens over the wall time of all batches; compilation excluded
    first block    seconds until an answer's first --block_len positions are decided (or it ends):
                   rounds until then, times the seconds a round of its batch takes; mean
    compile        seconds; points that share a program were compiled once and say the same
    AUP            per family, `aup`; only comparable within one run

Each batch is timed once. Where other programs run beside it, seconds can be off by a factor of two,
those of the baseline too: trust NFE there, and times of a quiet machine only.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import platform
import runpy
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import yaml
from absl import app, flags, logging
from tqdm import tqdm

import dlm
from decode.diffusion import DiffusionMethod, decode, init_state
from decode.generate import collect
from decode.methods import METHODS, family_of, named, override
from decode.rules import AdaBlock
from decode.view import OperatingPoint, plot_speed_quality
from dlm.tasks import Example, Task
from train.config import build

_TASK = flags.DEFINE_string("task", "waiting_line", "waiting_line, scan, countdown or sudoku.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/quickstart/train/model", "For dlm.load.")
_METHODS = flags.DEFINE_list("methods", [], "Names from decode/methods.py; default: all.")
_METHODS_FILE = flags.DEFINE_string("methods_file", "", "Points of your own instead.")
_BLOCK_LEN = flags.DEFINE_integer("block_len", 8, "Positions per block.", lower_bound=1)
_GEN_LEN = flags.DEFINE_integer("gen_len", 0, "Tokens per answer; 0: the task's.", lower_bound=0)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 200, "Held-out examples.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Examples decoded at once.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/compare", "Folder for everything written.")
_FRESH = flags.DEFINE_bool("fresh", False, "Measure everything again.")

BASELINE = "one_per_step"
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


# ---- What to measure ---------------------------------------------------------------------------


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


def points_by_name(names: Iterable[str], block_len: int) -> list[Point]:
    """Points of `decode/methods.py`."""
    return [Point(name, family_of(name), named(name, block_len)) for name in dict.fromkeys(names)]


def points_from_file(path: str, block_len: int) -> list[Point]:
    """Points of a methods file, see the top of this file.

    Raises:
      ValueError: it is not a list of changes to known methods.
      OSError: it cannot be read.
    """
    entries: Any
    if path.endswith(".py"):
        entries = runpy.run_path(path)["get_config"]()
        entries = entries.to_dict() if hasattr(entries, "to_dict") else entries
    else:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        try:
            entries = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    entries = entries.get("methods") if isinstance(entries, Mapping) else entries
    if not isinstance(entries, list | tuple) or not entries:
        raise ValueError(f"{path} must be a list of methods, or have one under 'methods'")
    points = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{path}, method {i}: {entry!r} must be fields, among them a name")
        changes = dict(entry)
        name, label, family = (changes.pop(key, None) for key in ("name", "label", "family"))
        try:
            method = override(named(name, block_len), changes)
        except ValueError as error:
            raise ValueError(f"{path}, method {i} ({name}): {error}") from error
        flat = [
            f"{key}={value}"
            for axis, change in changes.items()
            for key, value in (change.items() if isinstance(change, Mapping) else [(axis, change)])
        ]
        points.append(
            Point(str(label or " ".join([name, *flat])), str(family or family_of(name)), method)
        )
    return points


def make_points(
    job: Job, methods: Sequence[str] = (), methods_file: str = "", delimiter: str = ""
) -> tuple[list[Point], list[str]]:
    """The points to measure, baseline first, and one sentence for each that cannot be.

    Only methods that nobody asked for by name are left out; others raise.
    """
    if methods and methods_file:
        raise ValueError("give --methods or --methods_file, not both")
    own = points_from_file(methods_file, job.block_len) if methods_file else []
    names = [] if own else (methods or METHODS)
    points = {p.label: p for p in points_by_name([BASELINE, *names], job.block_len)}
    for point in own:
        if point.label in points and point.label != BASELINE:
            raise ValueError(f"{methods_file} has two methods labelled {point.label!r}")
        points[point.label] = point
    kept, left_out = [], []
    for point in points.values():
        method, blocks = point.method, point.method.scheduler
        if isinstance(blocks, AdaBlock) and delimiter and not np.size(blocks.delimiter_ids):
            assert job.lm.tokenizer is not None
            ids = tuple(job.lm.tokenizer.encode(delimiter))
            method = method.replace(scheduler=dataclasses.replace(blocks, delimiter_ids=ids))
        try:
            method.validate(job.lm.cfg)
        except ValueError as error:
            if methods or methods_file:
                raise ValueError(f"{point.label}: {error}") from error
            left_out.append(f"{point.label} is left out: {error}")
        else:
            kept.append(dataclasses.replace(point, method=method))
    return kept, left_out


# ---- Measuring ---------------------------------------------------------------------------------


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


def fingerprint(checkpoint: str) -> str:
    """Changes when a file of the checkpoint is written: of names, sizes and times."""
    root = pathlib.Path(checkpoint)
    stats = [(f.name, f.stat()) for f in sorted(root.rglob("*")) if f.is_file()]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(job: Job, points: Sequence[Point], log: pathlib.Path, checkpoint: str) -> list[dict]:
    """Measures each point, unless `log` has it with the same settings. Returns one dict each."""
    same = {
        "task": repr(job.task),
        "checkpoint": fingerprint(checkpoint),
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


# ---- Statistics --------------------------------------------------------------------------------


def bootstrap(values: Any, num: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean, examples drawn with replacement."""
    array, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(num)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def aup(points: Iterable[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism: area under accuracy over tokens per forward, worse ones fading.

    Reference: "d3LLM", arXiv:2601.07568. Points more than 5 below the slowest one are dropped; y is
    weighted by min(exp(-3 (1 - y / best)), 1), and what lies left of the slowest one is not.

    Args:
      points: (tokens per forward, accuracy in per cent) of one family, in any order.
      best: the best accuracy of all families compared, in per cent.
    """
    ordered = sorted(points, key=lambda point: (point[0], -point[1]))
    rho, y = ordered[0]
    area = rho * y
    kept = [(rho_i, y_i) for rho_i, y_i in ordered if y_i >= y - 5]

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1) if best > 0 else 0.0

    for (rho_0, y_0), (rho_1, y_1) in itertools.pairwise(kept):
        area += (rho_1 - rho_0) * (weighted(y_1) + weighted(y_0)) / 2
    return area


def summarise(
    points: Sequence[Point], records: Sequence[Mapping[str, Any]], groups: Mapping[str, list[int]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows of the table, one per point and group, and AUP per family and group."""
    rows = []
    base = next(r["seconds"] for p, r in zip(points, records, strict=True) if p.label == BASELINE)
    for group, members in groups.items():
        for point, record in zip(points, records, strict=True):
            score, tokens, forwards, first = (
                np.asarray(record[name], float)[members]
                for name in ("score", "tokens", "forwards", "first_block_s")
            )
            accuracy_low, accuracy_high = bootstrap(100 * score)
            nfe_low, nfe_high = bootstrap(forwards)
            rows.append(
                {
                    "group": group,
                    "method": point.label,
                    "family": point.family,
                    "accuracy": float(100 * score.mean()),
                    "accuracy_low": accuracy_low,
                    "accuracy_high": accuracy_high,
                    "nfe": float(forwards.mean()),
                    "nfe_low": nfe_low,
                    "nfe_high": nfe_high,
                    "tokens_per_forward": float(tokens.sum() / forwards.sum()),
                    "first_block_s": float(first.mean()),
                    # Of all examples, the same in every group:
                    "tokens_per_s": sum(record["tokens"]) / record["seconds"],
                    "seconds": record["seconds"],
                    "speedup": base / record["seconds"],
                    "compile_s": record["compile_s"],
                }
            )
    areas: dict[str, dict[str, float]] = {}
    for family in dict.fromkeys(point.family for point in points):
        areas[family] = {}
        for group in groups:
            own = [row for row in rows if row["group"] == group]
            curve = [(r["tokens_per_forward"], r["accuracy"]) for r in own if r["family"] == family]
            areas[family][group] = aup(curve, max(row["accuracy"] for row in own))
    return rows, areas


# ---- Reporting ---------------------------------------------------------------------------------


def device() -> str:
    return f"{jax.devices()[0].device_kind} ({platform.machine()})"


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as a table."""
    body = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = [" | ".join(map(str.ljust, cells, widths)) for cells in body]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def report(rows: Sequence[dict[str, Any]], areas: Mapping[str, Mapping[str, float]]) -> str:
    """A table per group, that of all examples with the times, and one of AUP."""
    tables: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cells = {
            "method": row["method"],
            "accuracy %": f"{row['accuracy']:.1f}",
            "from, to": f"{row['accuracy_low']:.1f}, {row['accuracy_high']:.1f}",
            "NFE": f"{row['nfe']:.2f}",
            "from, to ": f"{row['nfe_low']:.2f}, {row['nfe_high']:.2f}",
            "tokens/fwd": f"{row['tokens_per_forward']:.2f}",
        }
        if row["group"] == ALL:
            cells |= {
                "tokens/s": f"{row['tokens_per_s']:.0f}",
                "speed-up": f"{row['speedup']:.1f}x",
                "first block ms": f"{1000 * row['first_block_s']:.0f}",
                "compile s": f"{row['compile_s']:.1f}",
            }
        tables.setdefault(row["group"], []).append(cells)
    tables["AUP per family"] = [
        {"family": family} | {group: f"{area:.0f}" for group, area in by_group.items()}
        for family, by_group in areas.items()
    ]
    return "\n".join(f"### {title}\n\n{markdown(table)}\n" for title, table in tables.items())


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[OperatingPoint]]:
    """For the figure: a panel per group; of all examples only if there are no others."""
    found: dict[str, list[OperatingPoint]] = {}
    for row in rows:
        interval = row["accuracy_low"] / 100, row["accuracy_high"] / 100
        found.setdefault(row["group"], []).append(
            OperatingPoint(
                row["family"], "", row["tokens_per_forward"], row["accuracy"] / 100, interval
            )
        )
    return {group: points for group, points in found.items() if group != ALL} or found


def write(
    out: pathlib.Path,
    rows: Sequence[dict[str, Any]],
    areas: Mapping[str, Mapping[str, float]],
    points: Sequence[Point],
    about: Mapping[str, Any],
) -> None:
    """results.json, results.csv (a line per method and group, AUP with it) and the figure."""
    methods = {point.label: repr(point.method) for point in points}
    results = {"about": about, "rows": rows, "aup": areas, "methods": methods}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    with (out / "results.csv").open("w", newline="") as file:
        flat = [row | {"family_aup": areas[row["family"]][row["group"]]} for row in rows]
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)
    title = f"{about['task']}: accuracy against parallelism"
    plot_speed_quality(out / "speed_quality.png", panels(rows), title)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)
    try:
        if _TASK.value not in TASKS:
            raise ValueError(f"there is no task {_TASK.value!r}; there are {', '.join(TASKS)}")
        preset = TASKS[_TASK.value]
        job = make_job(
            dlm.load(_CHECKPOINT.value), preset, num_examples=_NUM_EXAMPLES.value,
            block_len=_BLOCK_LEN.value, gen_len=_GEN_LEN.value, batch_size=_BATCH_SIZE.value,
        )  # fmt: skip
        points, left_out = make_points(job, _METHODS.value, _METHODS_FILE.value, preset.delimiter)
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        log = out / "measured.jsonl"
        if _FRESH.value:
            log.unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    records = run(job, points, log, _CHECKPOINT.value)
    rows, areas = summarise(points, records, job.groups)
    about = {
        "task": _TASK.value,
        "checkpoint": _CHECKPOINT.value,
        "num_examples": len(job.examples),
        "gen_len": job.gen_len,
        "block_len": job.block_len,
        "batch_size": job.batch_size,
        "device": device(),
        "dtype": job.lm.cfg.dtype,
        "jax": jax.__version__,
    }
    write(out, rows, areas, points, about)
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print("\n".join([report(rows, areas), *left_out]))
    print(f"Written: results.json, results.csv and speed_quality.png in {out}/")


if __name__ == "__main__":
    app.run(main)
