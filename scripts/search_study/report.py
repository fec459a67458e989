"""What is said of each method: rows, their table, the figure. Columns:

    BLEU, score or diversity  of the first text; a search's is its best, one that is drawn any
    best of n      likewise, of the best of all its texts by the right answer: what choosing well
                   would give (oracle); of BLEU, the best by that of the sentence
    texts          different ones per prompt
    distinct-n     different n-grams of all texts of a prompt over their words, mean over prompts
    seq-rep-4      share of the first text's 4-grams that came up before in it, mean
    log p          of the first text, summed up over its tokens, mean
    forwards       of the model per prompt, for all its texts
    tokens read    in these, mean: a beam of four reads four in a forward
    tokens/s       of the first texts, over the wall time of all texts; compiling excluded

Words are those of `dlm.tasks.bleu.words` (13a); intervals are of 95 %, by a bootstrap over
examples. Everything is timed once.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from decode.evaluation.diversity import distinct, seq_rep
from decode.evaluation.figures import OperatingPoint, Panel, plot_speed_quality
from decode.evaluation.job import Job
from decode.evaluation.statistics import bootstrap_total
from decode.evaluation.tables import markdown
from dlm.tasks.bleu import words
from scripts.search_study.asked import Quality
from scripts.search_study.measure import Written

NGRAMS = (1, 2, 4)  # of distinct-n
Rows = list[dict[str, Any]]


def summarise(job: Job, quality: Quality, found: Mapping[str, Written]) -> Rows:
    """A row per method.

    Args:
      job: what was asked.
      quality: what its answers are worth.
      found: what each method wrote.
    """
    rows = []
    for method, written in found.items():
        every = [[words(text) for text in texts] for texts in written["texts"]]
        first = [0] * len(every)
        row: dict[str, Any] = {
            "method": method,
            "quality": _worth(job, quality, written, first),
            "best": None,
            "texts": _mean([len(set(texts)) for texts in written["texts"]]),
            "most_texts": max(map(len, written["texts"])),
        }
        if quality.best is not None:
            best = [
                quality.best(job.task, example, texts)
                for example, texts in zip(job.examples, written["texts"], strict=True)
            ]
            row["best"] = _worth(job, quality, written, best)
        row |= {f"distinct_{n}": _mean([distinct(texts, n) for texts in every]) for n in NGRAMS}
        row |= {
            "seq_rep_4": _mean([seq_rep(texts[0], 4) for texts in every]),
            **{name: _mean(written[name]) for name in ("log_prob", "forwards", "read")},
            "tokens_per_s": sum(written["tokens"]) / written["seconds"],
            "answers_per_s": len(every) / written["seconds"],
            "compile_s": written["compile_s"],
        }
        rows.append(row)
    return rows


def _worth(
    job: Job, quality: Quality, written: Written, chosen: Sequence[int]
) -> tuple[float, float, float]:
    """The quality of one text per example, and its interval."""
    counted = np.stack(
        [
            quality.count(job.task, example, texts[i])
            for example, texts, i in zip(job.examples, written["texts"], chosen, strict=True)
        ]
    )
    low, high = bootstrap_total(counted, quality.value)
    return quality.value(counted.sum(axis=0)), low, high


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def table(rows: Rows, quality: str) -> str:
    """The rows, to be read."""
    lines = []
    for row in rows:
        line = {"method": row["method"], quality: _with_interval(row["quality"])}
        if row["best"] is not None:
            line["best of n"] = f"{_with_interval(row['best'])}, n = {row['most_texts']}"
        line["texts"] = f"{row['texts']:.1f}"
        line |= {f"distinct-{n}": f"{row[f'distinct_{n}']:.3f}" for n in NGRAMS}
        line |= {
            "seq-rep-4": f"{row['seq_rep_4']:.3f}",
            "log p": f"{row['log_prob']:.2f}",
            "forwards": f"{row['forwards']:.1f}",
            "tokens read": f"{row['read']:.1f}",
            "tokens/s": f"{row['tokens_per_s']:.1f}",
        }
        lines.append(line)
    return markdown(lines)


def _with_interval(value: tuple[float, float, float]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*value)


def draw(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Quality against speed: of the first text, and of the best one where there is a saying.

    Args:
      results: of results.json.
      path: of the PNG.
    """
    rows = results["rows"]

    def panel(name: str) -> Panel:
        points = [
            OperatingPoint(
                row["method"], "", row["answers_per_s"], row[name][0] / 100,
                (row[name][1] / 100, row[name][2] / 100),
            )
            for row in rows
        ]  # fmt: skip
        return Panel(points, [row["method"] for row in rows], points[0].quality)

    panels = {"first text": panel("quality")}
    if rows[0]["best"] is not None:
        panels["best of all texts (oracle)"] = panel("best")
    plot_speed_quality(
        path,
        panels,
        f"{results['about']['task']}; dashed: {rows[0]['method']}",
        "prompts per second, all texts of each",
        quality_label=results["quality"],
        room=4.0,
    )  # names are long


def write_report(
    out: pathlib.Path, rows: Rows, quality: str, about: Mapping[str, Any], left_out: Sequence[str]
) -> str:
    """Writes results.json, search_study.md and search_study.png; returns the page."""
    results = {"about": about, "quality": quality, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    said = ", ".join(f"{name} {value}" for name, value in about.items())
    page = "\n\n".join([said, table(rows, quality), *left_out])
    (out / "search_study.md").write_text(page + "\n", encoding="utf-8")
    draw(results, out / "search_study.png")
    return page
