"""What is written of the measurements: tables and figures, of one seed and over seeds."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import causal_lm
from decode.evaluation.statistics import with_interval
from decode.evaluation.tables import markdown
from scripts.quickstart_spec.measure import Measurement

# Which drafter is said to have more of its drafts accepted than which.
ORDER = (
    ("Hydra, tree", "Medusa, tree"),
    ("Hydra++, tree", "Hydra, tree"),
    ("EAGLE-1, tree", "Hydra, tree"),
    ("EAGLE-3, tree", "Hydra, tree"),
    ("EAGLE-3, tree", "EAGLE-1, tree"),
    ("EAGLE-3, best tree", "EAGLE-3, tree"),
    ("DFlash, chain", "EAGLE-3, tree"),
    ("draft model, tree", "draft model, chain"),
)
_INTRODUCTION = """# Drafters side by side

Written by `python -m scripts.quickstart_spec --heads=all --seeds=0,1,2 --out=docs`: small targets
(1.0 M parameters), everything trained from nothing per seed; held-out prompts decoded greedily. A
target this small is hardly dearer to run than its drafters, so the columns to look at are
acceptance length (tokens per forward of the target) and forwards; how they turn into time on a
larger target is what `scripts.bench spec` measures. (DFlash is trained as briefly as the others
here, and drafts a chain.)"""


def table(found: list[Measurement]) -> str:
    return markdown(
        [
            {
                "drafter": m.drafter,
                "nodes": f"{m.nodes}",
                "same text": "yes" if m.is_identical else "NO",
                "acceptance length": f"{m.acceptance_length:.2f}",
                "forwards": f"{m.forwards:.1f}",
                "draft forwards": f"{m.draft_forwards:.1f}",
                "tokens/s": f"{m.tokens_per_s:.0f}",
                "speed-up": f"{m.speedup:.2f}x",
            }
            for m in found
        ]
    )


def draw(found: list[Measurement], title: str, path: pathlib.Path) -> None:
    """How many drafts a forward accepts, per drafter."""
    figure = Figure(figsize=(7, 0.45 * len(found) + 1.4), layout="constrained")
    axes = figure.subplots()
    most = max(len(m.accepted) for m in found)
    left = np.zeros(len(found))
    names = [f"{m.drafter} ({m.acceptance_length:.2f})" for m in found]
    for n in range(most):
        share = np.array([m.accepted[n] if n < len(m.accepted) else 0.0 for m in found])
        shade = str(0.9 - 0.8 * n / max(most - 1, 1))
        axes.barh(names, 100 * share, left=100 * left, color=shade, edgecolor="white", label=str(n))
        left += share
    axes.invert_yaxis()
    axes.set_xlabel("forwards of the target (%)")
    axes.set_title(title)
    axes.legend(title="accepted", fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=150)


def combine(rows_of_seeds: list[list[dict[str, Any]]]) -> str:
    """A line per drafter: means over seeds, with 95 % intervals."""
    lines = []
    for row in rows_of_seeds[0]:
        same = [r for rows in rows_of_seeds for r in rows if r["drafter"] == row["drafter"]]
        over = lambda key, digits: with_interval([r[key] for r in same], digits)  # noqa: B023, E731
        lines.append(
            {
                "drafter": row["drafter"],
                "nodes": f"{row['nodes']}",
                "same text": "yes" if all(r["is_identical"] for r in same) else "NO",
                "acceptance length": over("acceptance_length", 2),
                "forwards": over("forwards", 1),
                "draft forwards": over("draft_forwards", 1),
                "speed-up": over("speedup", 2),
            }
        )
    return markdown(lines)


def compare(rows_of_seeds: list[list[dict[str, Any]]]) -> str:
    """Differences in acceptance length within a seed, whether they are as published or not."""
    lengths = [{r["drafter"]: r["acceptance_length"] for r in rows} for rows in rows_of_seeds]
    found = []
    for more, less in ORDER:
        if all(more in of_seed and less in of_seed for of_seed in lengths):
            gaps = [of_seed[more] - of_seed[less] for of_seed in lengths]
            found.append({"more": more, "than": less, "by": with_interval(gaps, 2)})
    return markdown(found) if found else ""


def mean(rows_of_seeds: list[list[dict[str, Any]]]) -> list[Measurement]:
    """A measurement per drafter, whose acceptance is the mean over seeds."""
    found = []
    for row in rows_of_seeds[0]:
        same = [r for rows in rows_of_seeds for r in rows if r["drafter"] == row["drafter"]]
        length, accepted = (
            np.mean([r[key] for r in same], axis=0).tolist()
            for key in ("acceptance_length", "accepted")
        )
        both = {"acceptance_length": length, "accepted": accepted}
        found.append(Measurement(**(row | both)))
    return found


def write_page(out: pathlib.Path) -> None:
    """docs/drafters.md and its figures, from all results that lie beside it."""
    page = [_INTRODUCTION]
    for task in causal_lm.TASKS:
        file = out / f"drafters_{task}.json"
        if not file.is_file():
            continue
        seeds = json.loads(file.read_text(encoding="utf-8"))
        results = [seeds[key] for key in sorted(seeds, key=int)]
        about, rows = results[0]["about"], [result["rows"] for result in results]
        devices = sorted({result["about"]["device"] for result in results})
        title = f"{task}: drafts accepted per forward (tokens), {len(rows)} seeds"
        draw(mean(rows), title, out / f"drafters_{task}.png")
        page += [
            f"## {task}",
            f"![Drafts accepted](drafters_{task}.png)",
            f"{about['num_prompts']} held-out prompts, batch {about['batch']}, "
            f"{about['gen_len']} tokens, greedy, {about['dtype']}, {', '.join(devices)}; "
            f"{len(rows)} seeds, means and 95 % intervals (Student's t).",
            combine(rows),
            "Acceptance lengths compared within a seed:",
            compare(rows),
        ]
    (out / "drafters.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def write_results(folder: pathlib.Path, about: dict[str, Any], found: list[Measurement]) -> None:
    """results.json, results.csv and acceptance.png of one text and seed."""
    rows = [dataclasses.asdict(m) for m in found]
    (folder / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    with (folder / "results.csv").open("w", newline="") as file:
        flat = [{k: v for k, v in row.items() if k != "accepted"} for row in rows]
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)
    title = f"{about['task']}: drafts accepted per forward (mean tokens)"
    draw(found, title, folder / "acceptance.png")


def add_to_page(out: pathlib.Path, about: dict[str, Any], found: list[Measurement]) -> None:
    """Puts the results of one text and seed beside those that lie there, and writes the page."""
    out.mkdir(parents=True, exist_ok=True)
    collected = out / f"drafters_{about['task']}.json"
    seeds = json.loads(collected.read_text()) if collected.is_file() else {}
    rows = [dataclasses.asdict(m) for m in found]
    seeds[str(about["seed"])] = {"about": about, "rows": rows}
    collected.write_text(json.dumps(seeds, indent=1) + "\n")
    write_page(out)
