"""Counts how often tokens come up in texts: the background that `PcSampler` measures against.

    python -m scripts.token_frequencies --checkpoint=path/to/model --out=frequencies.npy a.txt b.txt

Writes [V] float32, the share of each token among all tokens; those that never came up get the share
of one. Text files are read line by line.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
from absl import app, flags
from tqdm import tqdm

from dlm.hf.files import read_config
from dlm.hf.tokenizer import load_tokenizer
from scripts.token_frequencies.count import frequencies

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of the model.", required=True)
_OUT = flags.DEFINE_string("out", None, "The .npy file to write.", required=True)


def main(argv: list[str]) -> None:
    files = [pathlib.Path(name) for name in argv[1:]]
    if missing := [str(file) for file in files if not file.is_file()] or (
        [] if files else ["none"]
    ):
        raise app.UsageError(f"files must be texts that exist, got {', '.join(missing)}")
    lines = (line for file in files for line in file.open(encoding="utf-8"))
    try:
        tokenizer, cfg = load_tokenizer(_CHECKPOINT.value), read_config(_CHECKPOINT.value)
        shares = frequencies(tokenizer, tqdm(lines, unit=" lines"), cfg.vocab_size)
        np.save(_OUT.value, shares)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{_OUT.value}: {len(shares)} tokens, the most frequent one {shares.max():.4f} of all")


if __name__ == "__main__":
    app.run(main)
