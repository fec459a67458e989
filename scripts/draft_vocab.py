"""Chooses the tokens that an EAGLE-3 network can draft: the most frequent ones of a training text.

    python -m scripts.draft_vocab --config=configs/causal_lm.py:python --size=96 \\
        --model=runs/python/target/model --out=runs/python/vocab.json
    python -m train --config=configs/draft_heads.py:python,eagle_3 ... \\
        --config.train.trainable.vocab=runs/python/vocab.json

Counts tokens of completions. End-of-text, which ends each of them, is always chosen. Says what
share of the text the tokens make up: what is not among them can never be drafted.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from tqdm import tqdm

import dlm
from dlm.tasks import Encoded, Task
from train.config import ConfigError, build
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


def choose_tokens(
    lm: dlm.LanguageModel, task: Task, size: int, num_examples: int
) -> tuple[list[int], str]:
    """The `size` most frequent tokens of a task's first completions, and a sentence about them."""
    counts: collections.Counter[int] = collections.Counter()
    num = min(len(task), num_examples)
    for i in tqdm(range(num), unit="example"):
        example = task[i]
        if isinstance(example, Encoded):
            counts.update(int(t) for t in example.completion)
        else:
            assert lm.tokenizer is not None
            counts.update([*lm.tokenizer.encode(example.completion), lm.cfg.eos_token_id])
    ranked = [token for token, _ in counts.most_common() if token != lm.cfg.eos_token_id]
    chosen = sorted([lm.cfg.eos_token_id, *ranked[: size - 1]])
    share = sum(counts[token] for token in chosen) / counts.total()
    about = f"{len(chosen)} of {len(counts)} different tokens in {num} examples"
    return chosen, f"{about}, {100 * share:.2f} % of the text"


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="Whose data to read.")
    flags.DEFINE_string("model", None, "Folder of the target.", required=True)
    flags.DEFINE_integer("size", 32_000, "Tokens to choose.", lower_bound=1)
    flags.DEFINE_integer("num_examples", 100_000, "At most so many are read.")
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.mark_flag_as_required("config")
    app.run(main)
