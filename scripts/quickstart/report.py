"""What is written of the measurements: tables, a picture, a page."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib

import jax
import numpy as np

import dlm
from decode.evaluation.figures import OperatingPoint, Panel, plot_speed_quality
from decode.evaluation.run import device
from decode.view import Answer, write_commit_order
from dlm.tasks.waiting_line import OPERATIONS
from scripts.quickstart.measure import BLOCK_LEN, GEN_LEN, PRESET, ROWS, Measurement

TITLE = "Waiting line; dashed: one token per step, no cache"


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
        "num_examples": num_examples,
        "rows": ROWS,
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

    groups = PRESET.groups or {}

    def panel(group: str) -> Panel:
        points = [
            OperatingPoint(
                method=m.rule,
                setting=f"cache: {m.cache}",
                speed=m.tokens_per_forward,
                quality=float(np.mean([m.accuracy[o] for o in groups[group]])),
            )
            for m in measurements
        ]
        return Panel(points, level=points[0].quality)

    panels = {group: panel(group) for group in groups}
    plot_speed_quality(workdir / "speed_quality.png", panels, TITLE)
    assert lm.tokenizer is not None
    write_commit_order(
        workdir / "commit_order.html", answers, lm.tokenizer, "Waiting line: order of decoding"
    )
