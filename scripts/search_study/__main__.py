"""Searches and ways to sample on one model and one task: quality, variety, forwards, speed.

    python -m scripts.search_study --task=translation --checkpoint=runs/translation/model \\
        --data=path/of/data --out=runs/search_study/translation
    python -m scripts.search_study --task=game24 --checkpoint=runs/game24/model --num_return=8
    python -m scripts.search_study --task=wikitext2 --checkpoint=smollm2 --data=path/of/data \\
        --methods=greedy,top_p_0.95,contrastive,momentum --num_examples=50

Tasks are translation (Multi30k), wikitext2 (how passages go on), humaneval and mbpp (programs run
in a sandbox) and those of `dlm/tasks/presets.py`; methods those of `scripts.search_study.methods`,
among them every named one of `decode/search/components.py`. Writes into `--out`: search_study.md,
whose columns are explained in `scripts.search_study.report`, results.json, search_study.png, and
answers.jsonl: a rerun decodes nothing that is in there with the same settings.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

import dlm
from decode.core.datastore import load_datastore
from decode.evaluation.job import make_job
from decode.search.loop import SearchMethod
from decode.search.strategies.superposed import Superposed
from scripts.search_study.asked import NAMES, about_job, asked
from scripts.search_study.measure import write_all
from scripts.search_study.methods import methods_of
from scripts.search_study.report import summarise, write_report
from train.host import set_up_command


def main(argv: list[str]) -> None:
    set_up_command(argv)
    given = flags.FLAGS
    out = pathlib.Path(given.out)
    try:
        preset, quality = asked(given.task, given.data)
        job = make_job(
            dlm.load(given.checkpoint, dtype=given.dtype or None), preset, block_len=1,
            num_examples=given.num_examples, gen_len=given.gen_len, batch_size=given.batch_size,
        )  # fmt: skip
        others = {}
        if given.datastore:
            method = SearchMethod(Superposed(load_datastore(given.datastore)))
            others["superposed_3"] = method
        methods, left_out = methods_of(given.methods, given.num_return, job.lm, others)
        out.mkdir(parents=True, exist_ok=True)
        found = write_all(job, methods, given.num_return, out / "answers.jsonl")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    about = about_job(job, given.task, given.checkpoint)
    about |= {"batch_size": job.batch_size, "num_return": given.num_return}
    rows = summarise(job, quality, found)
    print("\n" + write_report(out, rows, quality.name, about, left_out))
    print(f"\nWritten: search_study.md, results.json and search_study.png in {out}/")


if __name__ == "__main__":
    flags.DEFINE_enum("task", None, NAMES, "What is asked.", required=True)
    flags.DEFINE_string("checkpoint", None, "For dlm.load.", required=True)
    flags.DEFINE_string("data", "", "Folder of published files, by task.")
    flags.DEFINE_string("dtype", "", "Of the model, such as float32; empty: its own.")
    flags.DEFINE_list("methods", [], "By name, see above; default: all.")
    flags.DEFINE_string("datastore", "", "Of scripts.rest_datastore; adds superposed_3.")
    flags.DEFINE_integer("num_return", 4, "Texts per prompt.", lower_bound=1)
    flags.DEFINE_integer("num_examples", 200, "Held-out examples.", lower_bound=1)
    flags.DEFINE_integer("gen_len", 0, "Most tokens of a text; 0: the task's.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 32, "Rows decoded at once.", lower_bound=1)
    flags.DEFINE_string("out", "runs/search_study", "Folder for everything written.")
    app.run(main)
