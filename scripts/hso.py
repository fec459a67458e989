"""What moving states of the past is worth: perplexities of long texts, with hidden-state steps.

    python -m scripts.hso --checkpoint=smollm2 path/of/data/wikitext2/valid.txt \\
        path/of/data/gutenberg/melville_moby_dick.txt

Reads the first tokens of text files, window by window (see `decode.long_likelihood`), as the model
is and with `decode.core.hso.HSO` at several rates (arXiv:2112.08653); a window is judged before
states move to its good. Prints perplexities, also over the plain one, with a 95 % interval over
windows (bootstrap), and the time over that of plain reading.
"""

from __future__ import annotations

import math
import pathlib
import sys
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags

import dlm
from decode.core.hso import HSO
from decode.evaluation.statistics import bootstrap_total
from decode.evaluation.tables import markdown
from decode.long_likelihood import long_log_likelihood
from dlm.lm import LanguageModel
from train.host import set_up_command


def rows(lm: LanguageModel, file: pathlib.Path, given: flags.FlagValues) -> Iterator[dict]:
    """Lines of the table about the beginning of a text."""
    if lm.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, so it cannot read texts")
    text = file.read_text(encoding="utf-8")[: 20 * given.num_tokens]
    tokens = lm.tokenizer.encode_begin(text)[: given.num_tokens]
    asks = {"window": given.window, "context": given.context}
    for eta in (None, *map(float, given.etas)):
        hso = None if eta is None else HSO(eta=eta)
        long_log_likelihood(lm, [tokens[: given.context + given.window]], hso=hso, **asks)
        began = time.perf_counter()  # it is compiled
        (judged,) = long_log_likelihood(lm, [tokens], hso=hso, **asks)
        took = time.perf_counter() - began
        if eta is None:
            plain, base = judged.log_prob, took
        gain = judged.log_prob - plain
        windows = [gain[i : i + given.window] for i in range(0, len(gain), given.window)]
        counted = np.array([(some.sum(), len(some)) for some in windows])
        value = lambda total: math.exp(-total[0] / total[1])  # noqa: E731
        low, high = bootstrap_total(counted, value)
        yield {
            "text": file.name, "tokens": str(len(tokens)),
            "eta": "none" if eta is None else f"{eta:g}", "perplexity": f"{judged.perplexity:.2f}",
            "time": f"{took / base:.1f}",
            "over plain": f"{value(counted.sum(axis=0)):.4f} ({low:.4f} to {high:.4f})",
        }  # fmt: skip


def main(argv: list[str]) -> None:
    set_up_command(argv[:1])
    if not argv[1:]:
        raise app.UsageError("name at least one text file")
    try:
        lm = dlm.load(flags.FLAGS.checkpoint, dtype=flags.FLAGS.dtype or None)
        table = [row for x in argv[1:] for row in rows(lm, pathlib.Path(x), flags.FLAGS)]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(markdown(table))


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "For dlm.load; or smollm2.", required=True)
    flags.DEFINE_string("dtype", "", "Of the parameters; default: the checkpoint's.")
    flags.DEFINE_list("etas", ["0.001", "0.003", "0.01"], "Learning rates.")
    flags.DEFINE_integer("num_tokens", 2048, "Of each text.", lower_bound=2)
    flags.DEFINE_integer("window", 64, "Tokens judged at once.", lower_bound=1)
    flags.DEFINE_integer("context", 512, "Most tokens remembered.", lower_bound=1)
    app.run(main)
