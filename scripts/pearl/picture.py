"""Who computes when: the first rounds of PEARL on two devices, over those of draft and verify."""

from __future__ import annotations

import pathlib
from typing import Any

from matplotlib.figure import Figure

from decode.evaluation.figures import COLOURS, GREY

ROUNDS = 8  # that are drawn
LANES = ("PEARL: target", "PEARL: drafter", "draft and verify")


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a picture of what `scripts.pearl.measure.measure` found."""
    seconds = {name: 1e3 * value for name, value in found["seconds"].items()}
    target, drafter, other = COLOURS[0], COLOURS[1], GREY
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    at, rounds = 0.0, found["tokens"][:ROUNDS]
    for num in rounds:
        axes.barh(LANES[0], seconds["judge"], left=at, color=target, edgecolor="white")
        axes.barh(LANES[1], seconds["draft"], left=at, color=drafter, edgecolor="white")
        behind = at + max(seconds["judge"], seconds["draft"])
        axes.barh(LANES[0], seconds["settle"], left=behind, color=other)
        behind += seconds["settle"]
        axes.barh(LANES[1], seconds["follow"], left=behind, color=other)
        axes.annotate(f"+{num}", (at, LANES[0]), color="white", va="center", size=8)
        at = behind + seconds["follow"]
    # A round of draft and verify drafts, then judges: shares of it as of the programs alone.
    share = seconds["draft"] / (seconds["draft"] + seconds["judge"])
    left = 0.0
    while left + seconds["chain"] <= at:
        part = share * seconds["chain"]
        axes.barh(LANES[2], part, left=left, color=drafter, edgecolor="white")
        axes.barh(
            LANES[2], seconds["chain"] - part, left=left + part, color=target, edgecolor="white"
        )
        left += seconds["chain"]
    axes.invert_yaxis()
    axes.set_xlabel("ms, from times measured on one device; in white: tokens of a round")
    total = found["total"]
    axes.set_title(
        f"{sum(found['tokens'])} tokens: plain {total['plain']:.2f} s, draft and verify "
        f"{total['chain']:.2f} s, PEARL on two devices {total['two_devices']:.2f} s",
        size=10,
    )
    figure.savefig(path, dpi=150)
