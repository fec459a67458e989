"""What the training of drafters found: tokens per forward, simulated on answers held back."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from configs.smollm2 import RECIPES
from decode.evaluation.tables import markdown
from train.metrics import read_metrics

ACCEPTANCE = "valid/acceptance_length"


def curves(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and tokens per forward at every validation, of those that are trained to draft."""
    found = {}
    for name in RECIPES:
        if (folder / name / "model").exists():
            lines = read_metrics(folder / name)
            found[name] = [(int(m["step"]), m[ACCEPTANCE]) for m in lines if ACCEPTANCE in m]
    return {name: curve for name, curve in found.items() if curve}


def table(folder: pathlib.Path) -> str:
    """A line per drafter.

    Minutes are those from the first file of a run to the model: training, validation, whatever else
    the machine did.
    """
    rows = []
    for name, curve in curves(folder).items():
        first, last = (
            (folder / name / file).stat().st_mtime for file in ("config.json", "exported.json")
        )
        rows.append(
            {
                "drafter": f"`{name}`",
                "steps": str(curve[-1][0]),
                "minutes": f"{(last - first) / 60:.0f}",
                "tokens per forward at each validation": " / ".join(f"{x:.2f}" for _, x in curve),
            }
        )
    return markdown(rows)


def draw(found: Mapping[str, Sequence[Sequence[float]]], path: pathlib.Path) -> None:
    """What `curves` has found."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(found.items()):
        steps, lengths = zip(*curve, strict=True)
        axes.plot(steps, lengths, marker="o", markersize=3, label=name, color=f"C{i}")
    axes.set_xlabel("steps")
    axes.set_ylabel("tokens per forward, simulated")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=150)
