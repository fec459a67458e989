"""Chooses the tokens that an EAGLE-3 network can draft: the most frequent ones of a training text.

    python -m scripts.draft_vocab --config=configs/causal_lm.py:python --size=96 \\
        --model=runs/python/target/model --out=runs/python/vocab.json
    python -m train --config=configs/draft_heads.py:python,eagle_3 ... \\
        --config.train.trainable.vocab=runs/python/vocab.json

Counts tokens of completions. End-of-text, which ends each of them, is always chosen. Says what
share of the text the tokens make up: what is not among them can never be drafted.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

import dlm
from train.config import ConfigError, build
from train.data.frequent import choose_tokens
from train.host import only_flags


def main(argv: list[str]) -> None:
    only_flags(argv)
    try:
        lm = dlm.load(flags.FLAGS.model)
        data: Any = flags.FLAGS.config.data
        task = build({**data.task, **data.train}, "data.task")
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    chosen, about = choose_tokens(lm, task, flags.FLAGS.size, flags.FLAGS.num_examples)
    pathlib.Path(flags.FLAGS.out).write_text(json.dumps(chosen) + "\n", encoding="utf-8")
    print(f"{about}: {flags.FLAGS.out}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Whose data to read.")
    flags.DEFINE_string("model", None, "Folder of the target.", required=True)
    flags.DEFINE_integer("size", 32_000, "Tokens to choose.", lower_bound=1)
    flags.DEFINE_integer("num_examples", 100_000, "At most so many are read.")
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.mark_flag_as_required("config")
    app.run(main)
