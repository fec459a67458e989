"""Learned parallelism, measured: from training a model to the table of what each recipe buys.

    make study                                     all tasks, three seeds: some hours on two cores
    python -m scripts.study --tasks=waiting_line --seeds=0 --out=runs/study
    python -m scripts.study --tasks=word_problems --size=large   on an accelerator: 26 M parameters

Per task and seed, everything is made from nothing and differs by its seed:

    base           configs/mdlm_<task>.py
    trajectories   its right answers to training prompts, one token per step
    Learn2PD       configs/filter_learn2pd.py, on rounds decoded with knowledge of the answer
    dParallel      configs/distill_dparallel.py
    d3LLM          configs/distill_d3llm.py

Each system is decoded at several settings. Which one is reported is decided on `--num_pick`
held-out examples, the rest of which are reported: of the settings within one point of the base
model's one-token-per-step accuracy, the one with the fewest forwards; if there is none, the most
accurate. So the base model's threshold is tuned as carefully as everything else. Published settings
are reported as well.

Everything is resumable, and nothing that is finished is done again. Writes docs/study.md and a
figure per task beside it (`--out`); a run of some tasks replaces their sections. Models and
measurements stay in `--workdir`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

import dlm
from configs import collect_trajectories, distill_d3llm, distill_dparallel, filter_learn2pd
from decode.diffusion.components import (
    EntropyThreshold,
    Eos,
    Eotp,
    FixedBlocks,
    LearnedFilter,
    MultiBlock,
    Quota,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.job import ALL, TASKS, Job, Point, make_job, measure_points
from decode.evaluation.run import device
from decode.evaluation.statistics import with_interval
from decode.evaluation.tables import markdown
from dlm.heads.learn2pd import load_filter
from dlm.params import num_params
from train import learn2pd, loop, trajectories
from train.config import ConfigError
from train.host import keep_freed_memory

_INTRODUCTION = """# What learned parallelism buys

Written by `make study` (`scripts/study.py`, which says how systems are made and settings picked):
everything is made anew for every seed, on the device that is named. Forwards are those of the whole
model per answer, up to its end. Accuracy is that of the task's own scorer."""
BASELINE = "base, one token per step"
# System -> what it is compared with; in the order of the table.
SYSTEMS = {
    "base + threshold": "confidence threshold on the base model",
    "base + entropy": "entropy threshold on the base model",
    "Learn2PD": "the filter on the base model",
    "Learn2PD + EoTP": "the filter, and the canvas cut at the end of the text",
    "dParallel": "entropy threshold on the certainty-forced model",
    "d3LLM": "entropy threshold on several blocks at once, on the pseudo-trajectory model",
}
PUBLISHED = {
    "base + threshold": "0.9",
    "base + entropy": "0.5",
    "Learn2PD": "0.96",
    "Learn2PD + EoTP": "0.96",
    "dParallel": "0.5",
    "d3LLM": "0.5",
}
# `--size=large`: sections of the configs; ours.
LARGE = {
    "model": {"d_model": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64,
              "d_ff": 1408, "dtype": "bfloat16"},
    "base": {"optim": {"learning_rate": 6e-4, "warmup_steps": 200}, "train": {"num_steps": 4_000},
             "data": {"batch_size": 128}},
    "student": {"optim": {"learning_rate": 2e-4}, "train": {"num_steps": 600}},
}  # fmt: skip
MIN_GROUP = 4  # examples of a kind of question, picked on or reported, below which it has no table
THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ENTROPIES = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
TAUS = (0.5, 0.7, 0.8, 0.9, 0.96, 0.99)


@dataclasses.dataclass(frozen=True)
class Measured:
    """One system at one setting, on one seed.

    Attributes:
      system: key of `SYSTEMS`, or `BASELINE`.
      setting: its threshold, as text.
      score: per example, in [0, 1].
      forwards: per example.
      tokens: per example, up to end-of-text.
    """

    system: str
    setting: str
    score: np.ndarray
    forwards: np.ndarray
    tokens: np.ndarray

    def part(self, examples: slice) -> tuple[float, float]:
        """Accuracy in per cent and mean forwards over some examples."""
        return 100 * float(self.score[examples].mean()), float(self.forwards[examples].mean())


# ---- Making ------------------------------------------------------------------------------------


def make(task: str, size: str, seed: int, folder: pathlib.Path, smoke: bool) -> None:
    """Trains everything of one seed that is not there yet."""
    variant = "runlocal" if smoke else ""
    arg = f"{task},{variant}" if smoke else task
    print(f"\n{task}, seed {seed}: {folder}")

    config = importlib.import_module(f"configs.mdlm_{task}").get_config(variant)
    config.train.seed = config.data.seed = seed
    if size == "large":
        config.model.update(LARGE["model"])
        config.update(LARGE["base"])
    loop.run(config, folder / "base", "base")
    base = str(folder / "base" / "model")

    for name, oracle, num in (("trajectories", False, 0), ("rounds", True, 2_640)):
        config = collect_trajectories.get_config(arg)
        config.checkpoint, config.oracle = base, oracle
        if num and not smoke:
            config.num_examples = num
        trajectories.run(config, folder / name)

    config = filter_learn2pd.get_config(arg)
    config.trajectories, config.seed = str(folder / "rounds"), seed
    learn2pd.run(config, folder / "learn2pd")

    for name, recipe in (("dparallel", distill_dparallel), ("d3llm", distill_d3llm)):
        config = recipe.get_config(arg)
        config.data.task.path = str(folder / "trajectories")
        config.data.task.only_right = not smoke  # a model of a few steps has no right answer
        config.train.init_from = base
        config.train.seed = config.data.seed = seed
        if size == "large":
            config.update(LARGE["student"])
        loop.run(config, folder / name, name)


# ---- Measuring ---------------------------------------------------------------------------------


def points(system: str, block_len: int, lm: dlm.LanguageModel, folder: pathlib.Path) -> list[Point]:
    """A system at all its settings."""
    method = DiffusionMethod(FixedBlocks(block_len), stopper=Eos())
    rules: dict[str, Any]
    if system == BASELINE:
        return [Point(BASELINE, BASELINE, method.replace(rule=Quota(block_len)))]
    if system == "base + threshold":
        rules = {f"{t:g}": Threshold(t) for t in THRESHOLDS}
    elif system.startswith("Learn2PD"):
        learned = load_filter(folder / "learn2pd" / "filter", lm)
        rules = {f"{t:g}": LearnedFilter(learned, t) for t in TAUS}
        if system.endswith("EoTP"):
            method = method.replace(stopper=Eotp())
    else:
        rules = {f"{t:g}": EntropyThreshold(t) for t in ENTROPIES}
        if system == "d3LLM":
            method = method.replace(scheduler=MultiBlock(block_len, 4, 0.5))
    return [Point(setting, system, method.replace(rule=rule)) for setting, rule in rules.items()]


def measure(task: str, folder: pathlib.Path, num_examples: int) -> list[Measured]:
    """All systems at all settings, on the same held-out examples."""
    models = {"dParallel": "dparallel", "d3LLM": "d3llm"}
    found = []
    jobs: dict[str, Job] = {}
    block_len = collect_trajectories.TASKS[task]
    for system in (BASELINE, *SYSTEMS):
        model = models.get(system, "base")
        if model not in jobs:
            jobs[model] = make_job(
                dlm.load(folder / model / "model"),
                TASKS[task],
                num_examples=num_examples,
                block_len=block_len,
            )
        job = jobs[model]
        settings = points(system, block_len, job.lm, folder)
        for point in settings:
            point.method.validate(job.lm.cfg)
        records = measure_points(job, settings, folder / "measured.jsonl")
        for point, record in zip(settings, records, strict=True):
            arrays = (np.asarray(record[name], float) for name in ("score", "forwards", "tokens"))
            found.append(Measured(system, point.label, *arrays))
    return found


def pick(measured: Sequence[Measured], num_pick: int) -> dict[str, Measured]:
    """Per system, the setting to report, decided on the first `num_pick` examples."""
    examples = slice(num_pick)
    base = next(m for m in measured if m.system == BASELINE)
    needed = base.part(examples)[0] - 1
    picked = {BASELINE: base}
    for system in SYSTEMS:
        own = [m for m in measured if m.system == system]
        good = [m for m in own if m.part(examples)[0] >= needed]
        if good:
            picked[system] = min(good, key=lambda m: m.part(examples)[1])
        else:
            picked[system] = max(own, key=lambda m: m.part(examples)[0])
    return picked


# ---- Reporting ---------------------------------------------------------------------------------


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


def draw(studies: Sequence[Sequence[Mapping[str, Any]]], path: pathlib.Path) -> None:
    """Forwards against change in accuracy: a curve per system over its settings, means over seeds.

    Args:
      studies: the `summary` of every measurement, by seed.
      path: of the figure.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    of_base = [next(m["accuracy"] for m in study if m["system"] == BASELINE) for study in studies]
    for system in (BASELINE, *SYSTEMS):
        values = np.array(
            [
                [(m["accuracy"] - base, m["forwards"]) for m in study if m["system"] == system]
                for study, base in zip(studies, of_base, strict=True)
            ]
        )  # [seeds, settings, 2]
        change, forwards = values.mean(axis=0).T
        spread = np.abs(np.stack([values.min(axis=0), values.max(axis=0)]) - values.mean(axis=0))
        axes.errorbar(
            forwards, change, yerr=spread[..., 0], fmt="*" if system == BASELINE else "o-",
            markersize=12 if system == BASELINE else 4, capsize=2, label=system,
        )  # fmt: skip
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [t for t in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("forwards per answer (log)")
    axes.set_ylabel("change in accuracy (points)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    axes.set_title(
        f"Against one token per step ({np.mean(of_base):.1f} %); "
        f"mean of {len(studies)} seeds, bars: lowest and highest",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def groups(task: str, num_examples: int, folder: pathlib.Path) -> Mapping[str, list[int]]:
    """Examples by kind of question, as `scripts/compare.py` groups them."""
    job = make_job(
        dlm.load(folder / "base" / "model"),
        TASKS[task],
        num_examples=num_examples,
        block_len=collect_trajectories.TASKS[task],
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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)
    keep_freed_memory()
    if unknown := sorted(set(flags.FLAGS.tasks) - set(collect_trajectories.TASKS)):
        known = ", ".join(collect_trajectories.TASKS)
        sys.exit(f"error: --tasks has {unknown[0]!r}, which must be one of {known}")
    num_pick, num_examples = flags.FLAGS.num_pick, flags.FLAGS.num_examples
    if flags.FLAGS.smoke:
        num_pick, num_examples = 8, 8
    seeds = [int(seed) for seed in flags.FLAGS.seeds]
    out = pathlib.Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    page = read_sections(out / "study.md")
    size = flags.FLAGS.size
    for task in flags.FLAGS.tasks:
        name = task if size == "small" else f"{task}_{size}"
        folders = [pathlib.Path(flags.FLAGS.workdir) / name / f"seed{seed}" for seed in seeds]
        studies = []
        try:
            for seed, folder in zip(seeds, folders, strict=True):
                make(task, size, seed, folder, flags.FLAGS.smoke)
                studies.append(measure(task, folder, num_pick + num_examples))
        except (ConfigError, OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        sections = [
            f"{about(folders[0])}; {num_examples} held-out examples, "
            f"settings picked on {num_pick} others; {len(seeds)} seeds, "
            "95 % intervals over seeds (Student's t).\n",
            "Settings picked by the rule above:\n\n" + table(studies, num_pick, published=False),
            "Published settings:\n\n" + table(studies, num_pick, published=True),
            "Goals:\n\n" + goals(studies, num_pick),
        ]
        for group, members in groups(task, num_pick + num_examples, folders[0]).items():
            first = sum(i < num_pick for i in members)
            if group == ALL or min(first, len(members) - first) < MIN_GROUP:
                continue
            own = [restrict(measured, members) for measured in studies]
            head = f"{group} ({len(members) - first} examples), settings picked on {first} others"
            sections.append(f"{head}:\n\n" + table(own, first, published=False))
        sections = [name, f"![Speed and quality](study_{name}.png)", *sections]
        page[name] = "\n\n".join(sections)
        summaries = [[summary(m, num_pick) for m in study] for study in studies]
        draw(summaries, out / f"study_{name}.png")
        (out / f"study_{name}.json").write_text(json.dumps(summaries, indent=1))
        print("\n" + "\n\n".join(sections) + "\n")
    text = "\n\n## ".join([_INTRODUCTION, *page.values()])
    (out / "study.md").write_text(text + "\n", encoding="utf-8")
    print(f"Written: study.md and, per task, a figure and the numbers behind it in {out}/")


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


if __name__ == "__main__":
    flags.DEFINE_list(
        "tasks", [*collect_trajectories.TASKS], "Keys of `collect_trajectories.TASKS`."
    )
    flags.DEFINE_list("seeds", ["0", "1", "2"], "One whole study each.")
    flags.DEFINE_enum(
        "size", "small", ["small", "large"], "Of the models: the configs', or `LARGE`."
    )
    flags.DEFINE_integer("num_pick", 500, "Examples on which settings are picked.")
    flags.DEFINE_integer("num_examples", 1_000, "Examples that are reported.")
    flags.DEFINE_string("workdir", "runs/study", "Folder of models and measurements.")
    flags.DEFINE_string("out", "docs", "Folder of study.md and the figures.")
    flags.DEFINE_bool("smoke", False, "A few steps and examples: does it run?")
    app.run(main)
