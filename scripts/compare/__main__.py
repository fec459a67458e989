"""Decodes the same held-out examples with many methods: one table, one figure, AUP per family.

    python -m scripts.compare --task=waiting_line --checkpoint=runs/quickstart/train/model
    python -m scripts.compare ... --methods=threshold,threshold_0.7,local_leap
    python -m scripts.compare ... --methods_file=mine.yaml

Methods are those of `decode/diffusion/points.py`, or of a file (`scripts.compare.points`);
`one_per_step`, the baseline of speed-ups, is always measured. Writes into `--out`: results.json,
results.csv (`scripts.compare.report` says what the columns mean), speed_quality.png, and
measured.jsonl: a rerun skips what is in there with the same settings.
"""

from __future__ import annotations

import pathlib
import sys

import jax
from absl import app, flags

import dlm
from decode.evaluation.job import make_job, measure_points
from decode.evaluation.run import device
from dlm.tasks.presets import TASKS
from scripts.compare.points import make_points
from scripts.compare.report import report, summarise, write
from train.host import set_up_command

_TASK = flags.DEFINE_enum("task", "waiting_line", TASKS, "What is asked.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "runs/quickstart/train/model", "For dlm.load.")
_METHODS = flags.DEFINE_list("methods", [], "Names from decode/diffusion/points.py; default: all.")
_METHODS_FILE = flags.DEFINE_string("methods_file", "", "Points of your own instead.")
_BLOCK_LEN = flags.DEFINE_integer("block_len", 8, "Positions per block.", lower_bound=1)
_GEN_LEN = flags.DEFINE_integer("gen_len", 0, "Tokens per answer; 0: the task's.", lower_bound=0)
_NUM_EXAMPLES = flags.DEFINE_integer("num_examples", 200, "Held-out examples.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Rows decoded at once.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/compare", "Folder for everything written.")
_FRESH = flags.DEFINE_bool("fresh", False, "Measure everything again.")


def main(argv: list[str]) -> None:
    set_up_command(argv)
    try:
        preset = TASKS[_TASK.value]
        job = make_job(
            dlm.load(_CHECKPOINT.value), preset, num_examples=_NUM_EXAMPLES.value,
            block_len=_BLOCK_LEN.value, gen_len=_GEN_LEN.value, batch_size=_BATCH_SIZE.value,
        )  # fmt: skip
        points, left_out = make_points(job, _METHODS.value, _METHODS_FILE.value, preset.delimiter)
        out = pathlib.Path(_OUT.value)
        out.mkdir(parents=True, exist_ok=True)
        log = out / "measured.jsonl"
        if _FRESH.value:
            log.unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    records = measure_points(job, points, log)
    rows, areas = summarise(points, records, job.groups)
    about = {
        "task": _TASK.value,
        "checkpoint": _CHECKPOINT.value,
        "num_examples": len(job.examples),
        "gen_len": job.gen_len,
        "block_len": job.block_len,
        "batch_size": job.batch_size,
        "device": device(),
        "dtype": job.lm.cfg.dtype,
        "jax": jax.__version__,
    }
    write(out, rows, areas, points, about)
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print("\n".join([report(rows, areas), *left_out]))
    print(f"Written: results.json, results.csv and speed_quality.png in {out}/")


if __name__ == "__main__":
    app.run(main)
