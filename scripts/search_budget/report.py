"""What is said of searches at equal forwards: a table, and solved tasks over forwards as a figure.

    solved within N     of all examples, found with at most N forwards, and right
    solved              with all that a search may use
    forwards            until it ended, mean over examples
    checked             answers, and beginnings of some, likewise
    examples/s          wall time; of samples that of all, also those behind the first right one

Intervals are of 95 %, Wilson's over examples.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from decode.evaluation.figures import COLOURS, set_log_ticks
from decode.evaluation.statistics import bootstrap
from decode.evaluation.tables import markdown
from scripts.search_budget.searches import Tried

MULTIPLES = (1, 2, 4, 8, 16)  # of the forwards of one sample, rounded: columns of the table


def within(tried: Tried, forwards: float) -> list[bool]:
    """Whether each example was solved with at most so many forwards."""
    pairs = zip(tried["right"], tried["forwards"], strict=True)
    return [right and used <= forwards for right, used in pairs]


def columns(found: Mapping[str, Tried]) -> list[int]:
    """Numbers of forwards that are worth a column."""
    first = next(iter(found.values()))
    one = sum(first["forwards"]) / sum(first["checked"])
    return [round(n * one) for n in MULTIPLES]


def table(found: Mapping[str, Tried]) -> str:
    """A row per search."""
    lines = []
    for name, tried in found.items():
        line = {"search": name}
        line |= {f"solved within {n} (%)": _share(within(tried, n)) for n in columns(found)}
        line["solved (%)"] = _share(tried["right"])
        line["forwards"] = f"{np.mean(tried['forwards']):.0f}"
        line["checked"] = f"{np.mean(tried['checked']):.1f}"
        line["examples/s"] = f"{len(tried['right']) / tried['seconds']:.2g}"
        lines.append(line)
    return markdown(lines)


def _share(solved: Sequence[bool]) -> str:
    low, high = bootstrap(np.array(solved, float))
    return f"{100 * np.mean(solved):.0f} ({100 * low:.0f} to {100 * high:.0f})"


def draw(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Solved examples over forwards, a panel per task; a shade is a 95 % interval.

    Args:
      results: of results.json, of one task each.
      path: of the PNG.
    """
    figure = Figure(figsize=(4.8 * len(results), 3.9), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    names = dict.fromkeys(name for result in results for name in result["found"])
    colours = dict(zip(names, COLOURS, strict=False))
    for axis, result in zip(axes, results, strict=True):
        found = result["found"]
        high = max(max(tried["forwards"]) for tried in found.values())
        low = min(min(tried["forwards"]) for tried in found.values())
        at = np.geomspace(low, high, 100)
        for name, tried in found.items():
            solved = [np.array(within(tried, n), float) for n in at]
            axis.plot(at, [100 * one.mean() for one in solved], color=colours[name], label=name)
            ends = 100 * np.array([bootstrap(one) for one in solved])
            axis.fill_between(at, *ends.T, color=colours[name], alpha=0.12, linewidth=0)
        axis.set_title(result["about"]["task"], fontsize=11)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        axis.set_ylim(0, None)
        axis.set_xlabel("forwards of one text, at most, per example")
        set_log_ticks(axis, low, max(high, 1.1 * low))
    axes[0].set_ylabel("solved (%), 95 % interval")
    most = max(range(len(results)), key=lambda i: len(results[i]["found"]))
    axes[most].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def write_report(out: pathlib.Path, found: Mapping[str, Tried], about: Mapping[str, Any]) -> str:
    """Writes results.json, search_budget.md and search_budget.png; returns the page."""
    results = {"about": about, "found": found}
    (out / "results.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    said = ", ".join(f"{name} {value}" for name, value in about.items())
    page = f"{said}\n\n{table(found)}"
    (out / "search_budget.md").write_text(page + "\n", encoding="utf-8")
    draw([results], out / "search_budget.png")
    return page
