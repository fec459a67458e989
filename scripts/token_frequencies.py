"""Counts how often tokens come up in texts: the background that `PcSampler` measures against.

    python -m scripts.token_frequencies --checkpoint=path/to/model --out=frequencies.npy a.txt b.txt

Writes [V] float32, the share of each token among all tokens; those that never came up get the share
of one. Text files are read line by line.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

import numpy as np
from absl import app, flags
from tqdm import tqdm

from dlm.hf.files import read_config
from dlm.tokenizer import Tokenizer, load_tokenizer

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of the model.", required=True)
_OUT = flags.DEFINE_string("out", None, "The .npy file to write.", required=True)


def frequencies(tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int) -> np.ndarray:
    """Shares of tokens [V] float32.

    Args:
      tokenizer: of the model.
      texts: what is counted.
      vocab_size: V, rows of the model's embedding.

    Raises:
      ValueError: there are no tokens.
    """
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        np.add.at(counts, tokenizer.encode(text), 1)
    total = counts.sum()
    if not total:
        raise ValueError("the texts have no tokens: give at least one file with text")
    return (np.maximum(counts, 1) / total).astype(np.float32)


def main(argv: list[str]) -> None:
    files = [pathlib.Path(name) for name in argv[1:]]
    if missing := [str(file) for file in files if not file.is_file()] or (
        [] if files else ["none"]
    ):
        raise app.UsageError(f"files must be texts that exist, got {', '.join(missing)}")
    tokenizer = load_tokenizer(_CHECKPOINT.value)
    lines = (line for file in files for line in file.open(encoding="utf-8"))
    shares = frequencies(
        tokenizer, tqdm(lines, unit=" lines"), read_config(_CHECKPOINT.value).vocab_size
    )
    np.save(_OUT.value, shares)
    print(f"{_OUT.value}: {len(shares)} tokens, the most frequent one {shares.max():.4f} of all")


if __name__ == "__main__":
    app.run(main)
