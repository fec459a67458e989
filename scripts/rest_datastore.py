"""Builds a datastore, the tokens of many texts and a suffix array of them, in which drafters look.

    python -m scripts.rest_datastore --checkpoint=path/to/model --out=runs/datastore texts/
    python -m scripts.rest_datastore --checkpoint=smollm2 --out=runs/smollm2/rest \\
        --template="{prompt}{completion}" runs/smollm2/answers/train.jsonl

    drafter = REST(load_datastore("runs/datastore"))
    method = SearchMethod(Superposed(load_datastore("runs/datastore")), num_return=3)

Takes folders of `*.txt` and `*.py` files, each of which is a text, and files of JSON lines, each
line of which is one, made by a template over its fields. The tokens are those of the model's
tokenizer; on the device each takes 8 bytes.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

from absl import app, flags
from tqdm import tqdm

import dlm
from decode.core.datastore import build_datastore
from decode.core.streaming import check_tokenizer
from dlm.hf.files import read_config
from dlm.hf.tokenizer import load_tokenizer
from dlm.tasks.jsonl import read_records, render

ENDINGS = (".txt", ".py")


def read_texts(path: pathlib.Path, template: str) -> Iterator[str]:
    """Texts of a folder, or of a file of JSON lines.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: a line is not a JSON object or lacks a field, or the folder has no texts.
    """
    if not path.is_dir():
        for number, record in read_records(path):
            yield render(template, record, f"{path}, line {number}")
        return
    files = sorted(file for ending in ENDINGS for file in path.rglob(f"*{ending}"))
    if not files:
        raise ValueError(f"{path} has no file that ends with {' or '.join(ENDINGS)}")
    for file in files:
        yield file.read_text(encoding="utf-8", errors="replace")


def main(argv: list[str]) -> None:
    if not argv[1:]:
        raise app.UsageError("name at least one folder of texts or file of JSON lines")
    checkpoint, out = flags.FLAGS.checkpoint, flags.FLAGS.out
    try:
        if pathlib.Path(checkpoint).is_dir():  # else all of it must be read
            tokenizer, vocab_size = load_tokenizer(checkpoint), read_config(checkpoint).vocab_size
        else:
            lm = dlm.load(checkpoint)
            tokenizer, vocab_size = check_tokenizer(lm), lm.cfg.vocab_size
        paths = map(pathlib.Path, argv[1:])
        texts = (text for path in paths for text in read_texts(path, flags.FLAGS.template))
        tokens = (tokenizer.encode(text, plain=True) for text in tqdm(texts, unit=" texts"))
        build_datastore(tokens, vocab_size, out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    size = (pathlib.Path(out) / "tokens.npy").stat().st_size
    print(f"{out}: {size // 4:,} tokens, {size / 2**19:,.1f} MiB on the device")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "The model.", required=True)
    flags.DEFINE_string("out", None, "Folder for the datastore.", required=True)
    flags.DEFINE_string("template", "{text}", "The text of a JSON line, by its fields.")
    app.run(main)
