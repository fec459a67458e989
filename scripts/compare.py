"""Decodes the same held-out examples with many methods: one table, one figure, AUP per family.

    python -m scripts.compare --task=waiting_line --checkpoint=runs/quickstart/train/model
    python -m scripts.compare ... --methods=threshold,threshold_0.7,local_leap
    python -m scripts.compare ... --methods_file=mine.yaml

Methods are those of `decode/diffusion/points.py` (default: all). A methods file (.yaml, .json, or
.py with `get_config()`) is a list, or has one under "methods", of points that change fields of
them:

    - {name: threshold, label: threshold 0.8, rule: {threshold: 0.8}, scheduler: {block_len: 16}}
    - {name: klass, family: klass dual, cache: dual}
    - {name: threshold, family: learn2pd, filter: runs/filter/filter, rule: {threshold: 0.96}}

The last one has a filter (`train/learn2pd.py`) as its commit rule.

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
import json
import pathlib
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import yaml
from absl import app, flags, logging

import dlm
from decode.diffusion.components import AdaBlock, LearnedFilter
from decode.diffusion.points import METHODS, family_of, named, override
from decode.evaluation.figures import OperatingPoint, plot_speed_quality
from decode.evaluation.job import ALL, TASKS, Job, Point, make_job, measure_points
from decode.evaluation.run import device
from decode.evaluation.statistics import aup, bootstrap
from decode.evaluation.tables import markdown
from dlm.heads.learn2pd import load_filter

_TASK = flags.DEFINE_string("task", "waiting_line", "Key of `decode.evaluation.job.TASKS`.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/quickstart/train/model", "For dlm.load.")
_METHODS = flags.DEFINE_list("methods", [], "Names from decode/diffusion/points.py; default: all.")
_METHODS_FILE = flags.DEFINE_string("methods_file", "", "Points of your own instead.")
_BLOCK_LEN = flags.DEFINE_integer("block_len", 8, "Positions per block.", lower_bound=1)
_GEN_LEN = flags.DEFINE_integer("gen_len", 0, "Tokens per answer; 0: the task's.", lower_bound=0)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 200, "Held-out examples.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Examples decoded at once.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/compare", "Folder for everything written.")
_FRESH = flags.DEFINE_bool("fresh", False, "Measure everything again.")

BASELINE = "one_per_step"


# ---- What to measure ---------------------------------------------------------------------------


def points_by_name(names: Iterable[str], block_len: int) -> list[Point]:
    """Points of `decode/diffusion/points.py`."""
    return [Point(name, family_of(name), named(name, block_len)) for name in dict.fromkeys(names)]


def points_from_file(path: str, block_len: int, lm: dlm.LanguageModel | None = None) -> list[Point]:
    """Points of a methods file, see the top of this file.

    Filters must belong to `lm`.

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
        learned = changes.pop("filter", None)
        try:
            method = named(name, block_len)
            if learned is not None:
                method = method.replace(rule=LearnedFilter(load_filter(learned, lm)))
            method = override(method, changes)
        except (OSError, ValueError) as error:
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
    own = points_from_file(methods_file, job.block_len, job.lm) if methods_file else []
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


# ---- Summary -----------------------------------------------------------------------------------


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
    records = measure_points(job, points, log)
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
