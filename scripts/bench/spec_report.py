"""What `scripts.bench.spec_bench` has measured, as tables, sentences and a figure.

Per category, and over all:

    tau          tokens per forward of the target, what an end cut off not counted; plain: 1.00
    tokens/s     of decoding; reading the prompt and compiling apart
    with prompt  likewise, reading the prompt included
    share        of the time of plain decoding over that of the method
    break-even   tau from which a round pays: its seconds over those of a plain round
    same text    prompts whose text is plain decoding's, token for token; of the others the first
                 divergence is listed, with the margin between the two best log-probabilities there
    widths       rounds by how many nodes a controller had judged (0: nobody drafted), in per cent

What stands in brackets is a 95 % interval over prompts (bootstrap). Seconds of other libraries
include the prompt, and are compared with plain decoding's that do, too.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from decode.evaluation.statistics import bootstrap_ratio
from decode.evaluation.tables import markdown
from scripts.bench.spec_bench import CONTROLLED, PLAIN, Measured


def summary(found: list[Measured], categories: Iterable[str]) -> list[dict[str, Any]]:
    """A row per category and method, in this order; at last over all categories."""
    rows = []
    for category in [*categories, "all"]:
        here = [m for m in found if category in (m.category, "all")]
        plain = [m for m in here if m.method == PLAIN]
        for method in dict.fromkeys(m.method for m in here):
            of = [m for m in here if m.method == method]
            is_other = of[0].prefill_s is None
            times, plain_times = ([_seconds(m, is_other) for m in some] for some in (of, plain))
            lengths, counts = [m.num_tokens for m in of], [m.num_forwards for m in of]
            tokens, forwards = sum(lengths), sum(counts)
            plain_round_s = sum(plain_times) / sum(m.num_forwards for m in plain)
            rows.append(
                {
                    "category": category, "method": method, "prompts": len(of),
                    "tau": tokens / forwards,
                    "tau_interval": bootstrap_ratio(lengths, counts),
                    "tokens_per_s": None if is_other else tokens / sum(times),
                    "tokens_per_s_interval": None if is_other else bootstrap_ratio(lengths, times),
                    "with_prompt": tokens / sum(_seconds(m, True) for m in of),
                    "share": sum(plain_times) / sum(times),
                    "interval": bootstrap_ratio(plain_times, times),
                    "break_even": sum(times) / forwards / plain_round_s,
                    "same_text": sum(m.parting is None for m in of), "widths": _widths(of),
                }
            )  # fmt: skip
    return rows


def _seconds(measured: Measured, with_prompt: bool) -> float:
    prefill_s = measured.prefill_s if with_prompt else None
    return float(np.median(measured.seconds)) + (prefill_s or 0.0)


def _widths(found: list[Measured]) -> dict[int, int] | None:
    """Rounds by width, over all prompts."""
    total: dict[int, int] = {}
    for m in found:
        if m.rounds_by_width is None:
            return None
        for width, rounds in m.rounds_by_width.items():
            total[width] = total.get(width, 0) + rounds
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of `summary`, to be read."""
    lines = []
    for row in rows:
        widths = row["widths"] or {}
        total = max(1, sum(widths.values()))
        lines.append(
            {
                "category": row["category"],
                "method": row["method"],
                "tau": _with_range(row["tau"], row["tau_interval"], 2),
                "tokens/s": ""
                if row["tokens_per_s"] is None
                else _with_range(row["tokens_per_s"], row["tokens_per_s_interval"], 1),
                "with prompt": f"{row['with_prompt']:.1f}",
                "share of plain": _with_range(row["share"], row["interval"], 2),
                "break-even": f"{row['break_even']:.2f}",
                "same text": f"{row['same_text']}/{row['prompts']}",
                "widths (%)": ", ".join(f"{w}: {100 * n / total:.0f}" for w, n in widths.items()),
            }
        )
    return markdown(lines)


def by_category(rows: list[dict[str, Any]], controlled: bool) -> str:
    """A line per method and a column per category: tau, and behind the colon the share of plain.

    Args:
      rows: of `summary`.
      controlled: those with a controller, else the others.
    """
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name = row["method"]
        if name != PLAIN and name.endswith(CONTROLLED) == controlled:
            share = _with_range(row["share"], row["interval"], 2)
            line = lines.setdefault(name, {"method": name.removesuffix(CONTROLLED)})
            line[row["category"]] = f"{row['tau']:.2f}: {share}"
    return markdown([*lines.values()])


def _with_range(value: float, interval: tuple[float, float], digits: int) -> str:
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Share of plain decoding, a panel per category: without a controller hollow, else filled."""
    categories = list(dict.fromkeys(row["category"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != PLAIN))
    drafters = list(dict.fromkeys(name.removesuffix(CONTROLLED) for name in names))
    columns = min(4, len(categories))
    lines = -(-len(categories) // columns)
    size = 1.9 * columns + 1.8, lines * (0.2 * len(drafters) + 0.5) + 0.7
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for category, axes in itertools.zip_longest(categories, panels.flat):
        if category is None:
            axes.set_visible(False)
            continue
        axes.set_title(category, fontsize=8)
        axes.axvline(1, color="0.7", linewidth=1)
        of = {row["method"]: row for row in rows if row["category"] == category}
        for suffix, face, shift in (("", "white", -0.15), (CONTROLLED, "C0", 0.15)):
            found = [(i, of[d + suffix]) for i, d in enumerate(drafters) if d + suffix in of]
            if not found:
                continue
            share = np.array([row["share"] for _, row in found])
            low, high = np.array([row["interval"] for _, row in found]).T
            axes.errorbar(
                share, [i + shift for i, _ in found],
                xerr=np.maximum([share - low, high - share], 0), fmt="o", color="C0",
                markerfacecolor=face, markersize=4, linewidth=1,
                label="with a controller" if suffix else "without",
            )  # fmt: skip
        is_last = categories.index(category) + columns >= len(categories)  # of its column
        axes.tick_params(axis="x", which="both", labelsize=6, labelbottom=is_last)
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    first = panels[0, 0]
    first.set_xscale("log")
    first.set_yticks(range(len(drafters)), drafters)
    first.set_ylim(len(drafters) - 0.5, -0.5)
    first.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter("{x:g}")
    label = "tokens per second over those of plain decoding (95 % intervals over prompts)"
    figure.supxlabel(label, fontsize=8)
    lines_and_names = first.get_legend_handles_labels()
    figure.legend(*lines_and_names, fontsize=7, loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=150)


def divergences(found: list[Measured]) -> list[str]:
    """A sentence for every text that parts from plain decoding's."""
    return [
        f"{m.method}, {m.category} {m.prompt}: parts at token {m.parting.position} of "
        f"{m.num_tokens}, where the two best are {m.parting.margin:.2g} nats apart"
        for m in found
        if m.parting is not None
    ]
