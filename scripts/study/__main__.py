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

Each system is decoded at several settings; `scripts.study.measure` says which one is reported.
Everything is resumable, and nothing that is finished is done again. Writes docs/study.md and a
figure per task beside it (`--out`); a run of some tasks replaces their sections. Models and
measurements stay in `--workdir`.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

from dlm.tasks.presets import RECIPES
from scripts.study.make import make
from scripts.study.measure import measure
from scripts.study.page import read_sections, section, write_figure, write_page
from train.config import ConfigError
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    if unknown := sorted(set(flags.FLAGS.tasks) - set(RECIPES)):
        known = ", ".join(RECIPES)
        sys.exit(f"error: --tasks has {unknown[0]!r}, which must be one of {known}")
    num_pick, num_examples = flags.FLAGS.num_pick, flags.FLAGS.num_examples
    if flags.FLAGS.smoke:
        num_pick, num_examples = 8, 8
    seeds = [int(seed) for seed in flags.FLAGS.seeds]
    out = pathlib.Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    sections = read_sections(out / "study.md")
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
        sections[name] = section(name, task, folders[0], studies, num_pick, num_examples)
        write_figure(out, name, studies, num_pick)
        print("\n" + sections[name] + "\n")
    write_page(out, sections)
    print(f"Written: study.md and, per task, a figure and the numbers behind it in {out}/")


if __name__ == "__main__":
    flags.DEFINE_list("tasks", [*RECIPES], "What is studied.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "One whole study each.")
    flags.DEFINE_enum("size", "small", ["small", "large"], "The configs' models, or `make.LARGE`.")
    flags.DEFINE_integer("num_pick", 500, "Examples on which settings are picked.")
    flags.DEFINE_integer("num_examples", 1_000, "Examples that are reported.")
    flags.DEFINE_string("workdir", "runs/study", "Folder of models and measurements.")
    flags.DEFINE_string("out", "docs", "Folder of study.md and the figures.")
    flags.DEFINE_bool("smoke", False, "A few steps and examples: does it run?")
    app.run(main)
