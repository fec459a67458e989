"""Drafters for a real model, SmolLM2-135M-Instruct, from its answers to Spec-Bench's table.

    python -m scripts.smollm2 --steps=answers --data=path/of/data
    python -m scripts.smollm2 --steps=train --drafters=eagle_3,dflash
    python -m scripts.smollm2 --steps=measure --prompts=path/of/spec_bench --out=docs

`answers` has the model answer questions of GSM8K and MBPP and prompts that it makes up, and counts
its tokens; `train` runs `configs/smollm2.py`; `measure` decodes Spec-Bench's prompts plainly, with
drafters that need no training, and with those that were trained. Each step goes on where it was
interrupted, and what is finished is not done again. `--out` gets smollm2.md, .json and .png.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

import dlm
from configs import smollm2 as configs
from scripts.smollm2.answers import make_answers
from scripts.smollm2.make import choose_vocab, train
from scripts.smollm2.measure import measure
from train.config import ConfigError
from train.host import set_up_command

STEPS = ("answers", "train", "measure")


def main(argv: list[str]) -> None:
    set_up_command(argv)
    said = flags.FLAGS
    for name, given, known in (
        ("steps", said.steps, STEPS),
        ("drafters", said.drafters, tuple(configs.RECIPES)),
    ):
        if unknown := sorted(set(given) - set(known)):
            sys.exit(f"error: --{name} has {unknown[0]!r}, which must be one of {', '.join(known)}")
    folder = pathlib.Path(said.workdir)
    for step, flag, is_there in (
        ("answers", "data", (folder / "answers" / "prompts.jsonl").exists()),
        ("measure", "prompts", False),
    ):
        if step in said.steps and not (is_there or said[flag].value):
            sys.exit(f"error: --{flag} is missing, which --steps={step} reads")
    try:
        lm = dlm.load("smollm2", dtype="float32")
        if "answers" in said.steps:
            make_answers(lm, said.data, folder / "answers", said.num_answers, said.batch_size)
            choose_vocab(lm, folder / "answers")
        if "train" in said.steps:
            for name in said.drafters:
                train(name, folder)
        if "measure" in said.steps:
            measure(lm, folder, said.prompts, said.num_prompts, said.repeats, said.out)
    except (ConfigError, OSError, ValueError) as error:  # of transformers' process, too
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_list("steps", [*STEPS], "What is done.")
    flags.DEFINE_string("workdir", "runs/smollm2", "Folder of everything but the page.")
    flags.DEFINE_string("data", "", "Folder with gsm8k/train.jsonl and mbpp/train.jsonl.")
    flags.DEFINE_string("prompts", "", "Folder of Spec-Bench's question.jsonl.")
    flags.DEFINE_string("out", "docs", "Folder of the page.")
    flags.DEFINE_list("drafters", [*configs.RECIPES], "What is trained.")
    flags.DEFINE_integer("num_answers", 3600, "So many prompts are answered.")
    flags.DEFINE_integer("num_prompts", 10, "Per category.", lower_bound=1)
    flags.DEFINE_integer("repeats", 1, "Times that each is timed.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Rows answered at once.", lower_bound=1)
    app.run(main)
