"""What is written of the study: tables, goals, figures, by task."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import dlm
from decode.evaluation.job import ALL, make_job
from decode.evaluation.run import device
from decode.evaluation.statistics import with_interval
from decode.evaluation.tables import markdown
from dlm.params import num_params
from dlm.tasks.presets import TASKS
from scripts.study.figure import draw
from scripts.study.measure import BASELINE, PUBLISHED, SYSTEMS, Measured, pick

_INTRODUCTION = """# What learned parallelism buys

Written by `make study` (`scripts/study`, which says how systems are made and settings picked), and
the sections of larger models, on a GPU, by

    python -m scripts.study --size=large --tasks=waiting_line
    python -m scripts.study --size=large --tasks=word_problems --num_pick=200 --num_examples=400

Everything is made anew for every seed, on the device that is named. Forwards are those of the whole
model per answer, up to its end. Accuracy is that of the task's own scorer. In the figures up and to
the right is better; `python -m scripts.figures` draws them again, from `study_*.json`."""
MIN_GROUP = 4  # examples of a kind of question, picked on or reported, below which it has no table


def table(studies: Sequence[Sequence[Measured]], num_pick: int, published: bool) -> str:
    """A line per system: picked or published settings, over all seeds."""
    rows = []
    examples = slice(num_pick, None)
    picked = [pick(measured, num_pick) for measured in studies]
    bases = [chosen[BASELINE].part(examples) for chosen in picked]
    for system in (BASELINE, *SYSTEMS):
        if published and system in PUBLISHED:
            chosen = [
                next(m for m in measured if (m.system, m.setting) == (system, PUBLISHED[system]))
                for measured in studies
            ]
        else:
            chosen = [of_seed[system] for of_seed in picked]
        parts = [m.part(examples) for m in chosen]
        tokens = [m.tokens[examples].sum() / m.forwards[examples].sum() for m in chosen]
        settings = list(dict.fromkeys(m.setting for m in chosen))
        rows.append(
            {
                "system": system,
                "setting": "" if system == BASELINE else ", ".join(settings),
                "accuracy %": with_interval([accuracy for accuracy, _ in parts], 1),
                "change": with_interval(
                    [a - base for (a, _), (base, _) in zip(parts, bases, strict=True)], 1
                ),
                "forwards": with_interval([forwards for _, forwards in parts], 2),
                "tokens/forward": with_interval(tokens, 2),
                "fewer forwards": with_interval(
                    [base / f for (_, f), (_, base) in zip(parts, bases, strict=True)], 2
                ),
            }
        )
    return markdown(rows)


def goals(studies: Sequence[Sequence[Measured]], num_pick: int) -> str:
    """What was hoped for, and what came of it."""
    examples = slice(num_pick, None)
    picked = [pick(measured, num_pick) for measured in studies]

    def ratio(system: str, other: str) -> str:
        values = [
            chosen[other].part(examples)[1] / chosen[system].part(examples)[1] for chosen in picked
        ]
        return with_interval(values, 2)

    def loss(system: str, other: str) -> str:
        values = [
            chosen[other].part(examples)[0] - chosen[system].part(examples)[0] for chosen in picked
        ]
        return with_interval(values, 1)

    threshold = "base + threshold"
    lines = [
        ("certainty forcing against one token per step", "dParallel", BASELINE, "4"),
        ("certainty forcing against the base model's threshold", "dParallel", threshold, "1.5"),
        ("the filter against the base model's threshold", "Learn2PD", threshold, "1.3"),
    ]
    return markdown(
        [
            {
                "goal": what,
                "wanted": f"{wanted}x fewer forwards",
                "measured": f"{ratio(system, other)}x",
                "points of accuracy lost": loss(system, other),
            }
            for what, system, other, wanted in lines
        ]
    )


def groups(task: str, num_examples: int, folder: pathlib.Path) -> Mapping[str, list[int]]:
    """Examples by kind of question, as `scripts.compare` groups them."""
    job = make_job(
        dlm.load(folder / "base" / "model"),
        TASKS[task],
        num_examples=num_examples,
        block_len=TASKS[task].block_len,
    )
    return job.groups


def restrict(measured: Sequence[Measured], members: Sequence[int]) -> list[Measured]:
    """The same measurements of some examples."""
    index = np.asarray(members)
    return [
        dataclasses.replace(
            m, score=m.score[index], forwards=m.forwards[index], tokens=m.tokens[index]
        )
        for m in measured
    ]


def section(
    name: str,
    task: str,
    folder: pathlib.Path,
    studies: Sequence[Sequence[Measured]],
    num_pick: int,
    num_examples: int,
) -> str:
    """All that the page says of one task.

    Args:
      name: of the section: the task, and the size if that is not small.
      task: key of `dlm.tasks.presets.RECIPES`.
      folder: of one seed.
      studies: measurements, per seed.
      num_pick, num_examples: examples on which settings are picked, and which are reported.
    """
    sections = [
        f"{about(folder)}; {num_examples} held-out examples, "
        f"settings picked on {num_pick} others; {len(studies)} seeds, "
        "95 % intervals over seeds (Student's t).\n",
        "Settings picked by the rule above:\n\n" + table(studies, num_pick, published=False),
        "Published settings:\n\n" + table(studies, num_pick, published=True),
        "Goals:\n\n" + goals(studies, num_pick),
    ]
    for group, members in groups(task, num_pick + num_examples, folder).items():
        first = sum(i < num_pick for i in members)
        if group == ALL or min(first, len(members) - first) < MIN_GROUP:
            continue
        own = [restrict(measured, members) for measured in studies]
        head = f"{group} ({len(members) - first} examples), settings picked on {first} others"
        sections.append(f"{head}:\n\n" + table(own, first, published=False))
    sections = [name, f"![Speed and quality](study_{name}.png)", *sections]
    return "\n\n".join(sections)


def write_figure(
    out: pathlib.Path, name: str, studies: Sequence[Sequence[Measured]], num_pick: int
) -> None:
    """A section's figure, and the numbers behind it."""
    summaries = [[summary(m, num_pick) for m in study] for study in studies]
    draw(summaries, out / f"study_{name}.png")
    (out / f"study_{name}.json").write_text(json.dumps(summaries, indent=1))


def write_page(out: pathlib.Path, sections: Mapping[str, str]) -> None:
    """study.md."""
    text = "\n\n## ".join([_INTRODUCTION, *sections.values()])
    (out / "study.md").write_text(text + "\n", encoding="utf-8")


def about(folder: pathlib.Path) -> str:
    """The base model of a seed, and where it runs."""
    lm = dlm.load(folder / "base" / "model")
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return (
        f"{num_params(lm.cfg) / 1e6:.2f} M parameters, {lm.cfg.dtype}"
        + (f" (matmul precision {precision})" if precision else "")
        + f", {device()}"
    )


def read_sections(path: pathlib.Path) -> dict[str, str]:
    """The page's section of each task, those of earlier runs of other tasks."""
    if not path.is_file():
        return {}
    sections = path.read_text(encoding="utf-8").rstrip("\n").split("\n\n## ")[1:]
    return {section.partition("\n")[0]: section for section in sections}


def summary(m: Measured, num_pick: int) -> dict[str, Any]:
    """One system at one setting, over the examples that are reported."""
    accuracy, forwards = m.part(slice(num_pick, None))
    return {
        "system": m.system,
        "setting": m.setting,
        "accuracy": accuracy,
        "forwards": forwards,
    }
