"""The figure of a task: what is learned in colour, the base model's own rules in grey."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from decode.evaluation.figures import COLOURS, set_log_ticks, write_names
from scripts.study.measure import BASELINE

RULES = {"base + threshold": "0.45", "base + entropy": "0.65"}
PANELS = {
    "a filter beside the model": ("Learn2PD", "Learn2PD + EoTP"),
    "a student instead of it": ("dParallel", "d3LLM"),
}


def draw(studies: Sequence[Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Change in accuracy against how many times fewer forwards: a curve per system, by setting.

    Args:
      studies: `scripts.study.page.summary` of every measurement, by seed.
      path: of the figure.
    """
    bases = [next(m for m in study if m["system"] == BASELINE) for study in studies]

    def curve(system: str) -> np.ndarray:
        """[seeds, settings, 2]: change in points, times fewer forwards."""
        return np.array(
            [
                [
                    (m["accuracy"] - base["accuracy"], base["forwards"] / m["forwards"])
                    for m in study
                    if m["system"] == system
                ]
                for study, base in zip(studies, bases, strict=True)
            ]
        )

    figure = Figure(figsize=(9, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    names = []
    for axis, (title, systems) in zip(axes, PANELS.items(), strict=True):
        colours = RULES | dict(zip(systems, COLOURS, strict=False))
        of_panel = []
        for system, colour in colours.items():
            values = curve(system)
            change, fewer = values.mean(axis=0).T
            low, high = values[..., 0].min(axis=0), values[..., 0].max(axis=0)
            axis.plot(fewer, change, "o-", color=colour, markersize=4)
            if system in systems:
                axis.vlines(fewer, low, high, color=colour, alpha=0.4)
            end = int(fewer.argmax())
            of_panel.append((float(fewer[end]), float(change[end]), system, colour))
        axis.plot(1, 0, "*", color="black", markersize=11)
        axis.axhline(0, color="0.5", linewidth=0.9, linestyle="--", zorder=1)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("times fewer forwards")
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        names.append([*of_panel, (1.0, 0.0, "one token per step", "black")])
    most = max(x for of_panel in names for x, *_ in of_panel)
    set_log_ticks(axes[0], 1 / 1.15, most * 3)
    axes[0].set_ylabel("change in accuracy (points)")
    accuracy = np.mean([base["accuracy"] for base in bases])
    figure.suptitle(
        f"One token per step: {accuracy:.1f} %. Means of {len(studies)} seeds, bars: lowest and "
        "highest", fontsize=10,
    )  # fmt: skip
    figure.draw_without_rendering()  # so that places are known
    for axis, of_panel in zip(axes, names, strict=True):
        write_names(axis, of_panel)
    figure.savefig(path, dpi=130)
