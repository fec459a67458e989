"""Every figure of the documentation, from the tables on its pages and the numbers beside them."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable

import numpy as np

from decode.evaluation.figures import OperatingPoint, Panel, plot_speed_quality
from decode.evaluation.tables import read_markdown
from scripts import search_trees
from scripts.bench import spec_report
from scripts.plan import page as pods
from scripts.quickstart.report import TITLE
from scripts.quickstart_spec import page as drafters
from scripts.search_budget import report as search_budget
from scripts.search_study import report as search_study
from scripts.smollm2 import training
from scripts.study import figure as study

# docs/methods.md: per panel, the curves in colour and the named methods on each.
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "a fixed number per step": {
        "quota: 1, 2, 4": ("one_per_step", "quota_2", "quota_4"),
        "random order": ("random_order",),
        "Dream: margin": ("dream_margin",),
        "Dream: origin": ("dream_origin",),
        "Dream: sampled": ("dream_sampled",),
    },
    "as many as are sure": {
        "threshold": ("threshold", "threshold_0.7", "threshold_0.5"),
        "factor": ("factor", "factor_1.9"),
        "entropy threshold": ("entropy_threshold",),
        "entropy budget": ("entropy_budget",),
        "KLASS": ("klass",),
        "LocalLeap": ("local_leap",),
        "hierarchical": ("hierarchical",),
    },
    "a threshold, and a cache": {
        "no cache": ("threshold",),
        "prefix": ("threshold_prefix_cache",),
        "dual": ("threshold_dual_cache",),
        "vicinity": ("vicinity_cache",),
        "delayed": ("delayed_cache",),
    },
    "other blocks": {
        "AdaBlock": ("adablock",),
        "blocks at once": ("multi_block",),
        "gated": ("multi_block_gated",),
        "SlowFast": ("slow_fast",),
        "sub-blocks": ("sub_blocks",),
    },
    "memory, guesses, early ends": {
        "credits": ("credit", "credit_0.7"),
        "smoothing": ("smoothing",),
        "FreeDave": ("freedave",),
        "FreeDave, threshold": ("freedave_threshold",),
        "Prophet": ("prophet",),
        "EoTP": ("eotp",),
    },
    "tokens may be taken back": {
        "WINO": ("wino",),
        "token edits": ("token_edit",),
        "remasking": ("remask",),
        "ReMDM": ("remdm",),
        "running confidence": ("running_confidence",),
    },
}
OTHER_TRAINING = ("block_causal", "uniform_noise")  # not drawn: for models trained otherwise
MOST_LOST = 0.2  # in quality; what loses more is named in the title instead


def methods(page: pathlib.Path, group: str, path: pathlib.Path, title: str) -> None:
    """A column of docs/methods.md: a panel per kind of method, all others in grey.

    Args:
      page: docs/methods.md.
      group: heading of the column of accuracies; that of forwards follows it.
      path: of the figure.
      title: of the figure.
    """
    text = page.read_text(encoding="utf-8")
    text = text.replace("| NFE |", "| NFE, one |", 1).replace("| NFE |", "| NFE, many |", 1)
    table = next(rows for rows in read_markdown(text) if "method" in rows[0])
    forwards_of = list(table[0])[list(table[0]).index(group) + 1]
    measured = {row["method"].strip("`"): row for row in table if row[group][0].isdigit()}
    base = float(measured["one_per_step"][forwards_of])
    level = float(measured["one_per_step"][group].split()[0]) / 100

    def point(name: str, curve: str) -> OperatingPoint:
        quality = float(measured[name][group].split()[0]) / 100
        return OperatingPoint(curve, "", base / float(measured[name][forwards_of]), quality)

    every = [name for name in measured if name not in OTHER_TRAINING]
    below = [name for name in every if point(name, "").quality < level - MOST_LOST]
    title += "; dashed: one token per step; grey: all others"
    for name in below:
        title += f"; not drawn: {name}, {100 * point(name, '').quality:.0f} %"
    panels = {}
    for panel, curves in METHODS.items():
        curve_of = {name: curve for curve, names in curves.items() for name in names}
        points = [point(name, curve_of.get(name, name)) for name in every if name not in below]
        shown = [curve for curve in curves if curve in {p.method for p in points}]
        panels[panel] = Panel(points, shown, level)
    speed = "times fewer forwards than one token per step"
    plot_speed_quality(path, panels, title, speed, columns=3)


def quickstart(page: pathlib.Path, path: pathlib.Path) -> None:
    """The first table of docs/quickstart.md."""
    rows = read_markdown(page.read_text(encoding="utf-8"))[0]
    one = ("copy", "reverse", "insert at", "remove at", "replace at")

    def panel(columns: tuple[str, ...]) -> Panel:
        points = [
            OperatingPoint(
                row["rule"],
                f"cache: {row['cache']}",
                float(row["tokens/forward"]),
                float(np.mean([float(row[column]) for column in columns])) / 100,
            )
            for row in rows
        ]
        return Panel(points, level=points[0].quality)

    panels = {"one right answer": panel(one), "many right answers": panel(("shuffle, … random",))}
    plot_speed_quality(path, panels, TITLE)


def figures(docs: pathlib.Path) -> dict[str, Callable[[], None]]:
    """What draws each figure of a folder, by the figure's name."""
    found: dict[str, Callable[[], None]] = {
        "speed_quality": functools.partial(
            quickstart, docs / "quickstart.md", docs / "speed_quality.png"
        )
    }
    for name, group, title in (
        ("methods", "many right answers", "Waiting line, many right answers"),
        ("methods_scan", "SCAN", "SCAN"),
    ):
        found[name] = functools.partial(
            methods, docs / "methods.md", group, docs / f"{name}.png", title
        )
    for file in sorted(docs.glob("*.json")):
        numbers, out = json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png")
        if file.stem.startswith("study_"):
            found[file.stem] = functools.partial(study.draw, numbers, out)
        elif file.stem.startswith("drafters_"):
            found[file.stem] = functools.partial(drafters.draw_seeds, numbers, out)
        elif file.stem.startswith("search_study_"):
            found[file.stem] = functools.partial(search_study.draw, numbers, out)
        elif file.stem in ("spec_bench", "smollm2"):
            found[file.stem] = functools.partial(spec_report.draw, numbers, out)
        elif file.stem == "smollm2_training":
            found[file.stem] = functools.partial(training.draw, numbers, out)
        elif file.name == search_trees.FILE:
            found |= search_trees.pictures(numbers, docs)
        elif file.name == pods.FILE:
            found[file.stem] = functools.partial(pods.draw, pods.in_order(numbers["cases"]), out)
    budgets = [json.loads(f.read_text(encoding="utf-8")) for f in docs.glob("search_budget_*.json")]
    if budgets:
        budgets.sort(key=lambda one: str(one["about"]["task"]))
        out = docs / "search_budget.png"
        found["search_budget"] = functools.partial(search_budget.draw, budgets, out)
    return found
