"""Training, with everything in one folder: answers, the draft vocabulary, a run per drafter."""

from __future__ import annotations

import json
import pathlib

import dlm
from configs import smollm2 as configs
from train import loop
from train.config import build
from train.data.frequent import choose_tokens


def config_of(name: str, folder: pathlib.Path) -> configs.ConfigDict:
    """The settings of a drafter, with files in `folder`."""
    config = configs.get_config(name)
    config.data.task.path = str(folder / "answers" / "train.jsonl")
    config.data.valid.path = str(folder / "answers" / "valid.jsonl")
    if "vocab" in config.train.trainable:
        config.train.trainable.vocab = str(folder / "answers" / "vocab.json")
    if name == "stop":
        config.train.init_from = str(folder / "draft" / "model")
    return config


def choose_vocab(lm: dlm.LanguageModel, folder: pathlib.Path) -> None:
    """Writes vocab.json: the tokens that answers are made of."""
    task = build(config_of("draft", folder.parent).data.task.to_dict(), "data.task")
    chosen, about = choose_tokens(lm, task, configs.NUM_IDS, len(task))
    (folder / "vocab.json").write_text(json.dumps(chosen) + "\n", encoding="utf-8")
    print(about)


def train(name: str, folder: pathlib.Path) -> None:
    """Trains a drafter, or goes on with it."""
    result = loop.run(config_of(name, folder), folder / name, name)
    if result.model_path is None:
        raise SystemExit("training was interrupted: run the same command again to continue")
