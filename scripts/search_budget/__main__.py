"""Searches that may check answers beside samples that may, too: what is solved over forwards.

    python -m scripts.search_budget --task=game24 --checkpoint=runs/game24/model \\
        --out=runs/search_budget/game24
    python -m scripts.search_budget --task=mbpp --checkpoint=smollm2 --data=path/of/data \\
        --num_examples=40 --num=16 --out=runs/search_budget/mbpp

Whoever can check an answer need not search: samples can be drawn until one passes. So that is the
baseline here. A*-decoding (arXiv:2505.13672) is told how right the beginning of an answer is, where
that can be said, PG-TD (arXiv:2303.05510) what a whole answer is worth: of puzzles whether it is
right, of programs the share of the first half of their tests that they pass; all tests say what is
solved. Each ends with the first answer that passes. Writes into `--out`: search_budget.md, whose
columns are explained in `scripts.search_budget.report`, results.json, search_budget.png, and
tried.jsonl: a rerun decodes nothing that is in there with the same settings.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

import dlm
from decode.evaluation.job import make_job
from scripts.search_budget.asked import NAMES, read
from scripts.search_budget.report import write_report
from scripts.search_budget.searches import searches, try_all
from scripts.search_study.asked import about_job
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    given = flags.FLAGS
    out = pathlib.Path(given.out)
    try:
        asked = read(given.task, given.data)
        job = make_job(
            dlm.load(given.checkpoint, dtype=given.dtype or None), asked.preset, block_len=1,
            num_examples=given.num_examples, gen_len=given.gen_len,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        found = try_all(job, searches(asked, given.num), out / "tried.jsonl")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    about = about_job(job, given.task, given.checkpoint) | {"num": given.num}
    print("\n" + write_report(out, found, about))
    print(f"\nWritten: search_budget.md, results.json and search_budget.png in {out}/")


if __name__ == "__main__":
    flags.DEFINE_enum("task", None, NAMES, "What is asked.", required=True)
    flags.DEFINE_string("checkpoint", None, "For dlm.load.", required=True)
    flags.DEFINE_string("data", "", "Folder of published files, by task.")
    flags.DEFINE_string("dtype", "", "Of the model, such as float32; empty: its own.")
    flags.DEFINE_integer("num", 64, "Samples, expansions and rollouts.", lower_bound=1)
    flags.DEFINE_integer("num_examples", 200, "Held-out examples.", lower_bound=1)
    flags.DEFINE_integer("gen_len", 0, "Most tokens of a text; 0: the task's.", lower_bound=0)
    flags.DEFINE_string("out", "runs/search_budget", "Folder for everything written.")
    app.run(main)
