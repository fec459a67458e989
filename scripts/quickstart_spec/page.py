"""What is written of the measurements: tables and figures, of one seed and over seeds."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from configs import causal_lm
from decode.evaluation.figures import COLOURS
from decode.evaluation.statistics import interval, with_interval
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
(1.0 M parameters), everything trained from nothing per seed; held-out prompts decoded greedily.
Acceptance length is tokens per forward of the target. There are no times here: a target this small
is hardly dearer to run than its drafters. What a round costs on larger ones is measured by
`python -m scripts.bench spec` ([Drafters and acceptance](speculative.md#what-is-measured)).
DFlash is trained as briefly as the others, and drafts a chain. `python -m scripts.figures` draws
the figures again, from `drafters_python.json` and `drafters_scan.json`."""


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


def kind(drafter: str) -> str:
    """What was trained for it."""
    if drafter in (
        "none",
        "prompt lookup",
        "suffix decoding",
        "token recycling, tree",
        "lookahead",
    ):
        return "nothing"
    return "a smaller model" if drafter.startswith("draft model") else "a head of the target"


def draw(rows_of_seeds: list[list[dict[str, Any]]], title: str, path: pathlib.Path) -> None:
    """Tokens per forward of every drafter: means, with 95 % intervals over seeds if several."""
    lengths: dict[str, list[float]] = {}
    for row in itertools.chain(*rows_of_seeds):
        lengths.setdefault(row["drafter"], []).append(row["acceptance_length"])
    means, halves = zip(*(interval(values) for values in lengths.values()), strict=True)
    kinds = [kind(drafter) for drafter in lengths]
    colours = dict(zip(dict.fromkeys(kinds), COLOURS, strict=False))
    figure = Figure(figsize=(7, 0.32 * len(lengths) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        list(lengths), means, xerr=halves, color=[colours[k] for k in kinds], alpha=0.85,
        error_kw={"ecolor": "0.3", "elinewidth": 1},
    )  # fmt: skip
    for i, mean in enumerate(means):
        axes.text(0.06, i, f"{mean:.2f}", va="center", color="white", fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color="0.4", linewidth=0.9, linestyle="--")
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per forward of the target; dashed: without drafts")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, alpha=0.85, label=k) for k, colour in colours.items()]
    axes.legend(handles=handles, title="trained for it", fontsize=8, title_fontsize=8)
    axes.set_title(title, fontsize=11)
    figure.savefig(path, dpi=130)


def draw_seeds(seeds: dict[str, Any], path: pathlib.Path) -> None:
    """The figure of one text's drafters_<text>.json."""
    rows = [seeds[key]["rows"] for key in sorted(seeds, key=int)]
    task = path.stem.removeprefix("drafters_")
    over = f", {len(rows)} seeds, 95 % intervals" if len(rows) > 1 else ""
    draw(rows, f"{task}: same text, fewer forwards{over}", path)


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
        draw_seeds(seeds, out / f"drafters_{task}.png")
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
    draw([rows], f"{about['task']}: same text, fewer forwards", folder / "acceptance.png")


def add_to_page(out: pathlib.Path, about: dict[str, Any], found: list[Measurement]) -> None:
    """Puts the results of one text and seed beside those that lie there, and writes the page."""
    out.mkdir(parents=True, exist_ok=True)
    collected = out / f"drafters_{about['task']}.json"
    seeds = json.loads(collected.read_text()) if collected.is_file() else {}
    rows = [dataclasses.asdict(m) for m in found]
    seeds[str(about["seed"])] = {"about": about, "rows": rows}
    collected.write_text(json.dumps(seeds, indent=1) + "\n")
    write_page(out)
