"""What is said of measured methods: the rows of the table, its text, the files. Columns:

    accuracy       per cent, with a bootstrap 95 % interval over examples
    NFE            forwards per answer, with such an interval
    tokens/fwd     tokens up to end-of-text over forwards, all answers together
    tokens/s       the same tokens over the wall time, in which rows that are done make place for
                   the next examples; compilation excluded
    first block    seconds from when an example got its row until its first --block_len positions
                   are decided (or it ends): rounds until then, times the seconds of a round; mean
    compile        seconds of compiling, or of reading programs from disk; of points that share
                   programs, only the first one's
    AUP            per family, `aup`; only comparable within one run

Everything is timed once. Where other programs run beside it, seconds can be off by a factor of two,
those of the baseline too: trust NFE there, and times of a quiet machine only.
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from decode.evaluation.figures import OperatingPoint, Panel, plot_speed_quality
from decode.evaluation.job import ALL, Measurement, Point
from decode.evaluation.statistics import aup, bootstrap
from decode.evaluation.tables import markdown
from scripts.compare.points import BASELINE


def summarise(
    points: Sequence[Point], records: Sequence[Measurement], groups: Mapping[str, list[int]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Rows of the table, one per point and group, and AUP per family and group."""
    rows: list[dict[str, Any]] = []
    base = next(r["seconds"] for p, r in zip(points, records, strict=True) if p.label == BASELINE)
    for group, members in groups.items():
        for point, record in zip(points, records, strict=True):
            score, tokens, forwards, first = (
                np.asarray(values, float)[members]
                for values in (
                    record["score"],
                    record["tokens"],
                    record["forwards"],
                    record["first_block_s"],
                )
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


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Panel]:
    """For the figure: a panel per group; of all examples only if there are no others."""
    found: dict[str, Panel] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        points = [
            OperatingPoint(
                row["family"],
                "",
                row["tokens_per_forward"],
                row["accuracy"] / 100,
                (row["accuracy_low"] / 100, row["accuracy_high"] / 100),
            )
            for row in own
        ]
        level = next(row["accuracy"] for row in own if row["method"] == BASELINE) / 100
        found[group] = Panel(points, level=level)
    return {group: panel for group, panel in found.items() if group != ALL} or found


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
    title = f"{about['task']}: the front in colour, all others grey; dashed: one token per step"
    plot_speed_quality(out / "speed_quality.png", panels(rows), title)
