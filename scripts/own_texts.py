"""Has a model go on with prompts by its own will, at temperature 1: what `LengthLoss` learns from.

    python -m scripts.own_texts --checkpoint=path/to/model --prompts=prompts.jsonl \\
        --out=runs/own --gen_len=192 --num_samples=4

Prompts are JSON lines with a "prompt", a text or token ids. Writes train.jsonl and valid.jsonl,
`dlm.tasks.own_texts:OwnTexts`: all texts of a twentieth of the prompts are held out.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from absl import app, flags

import dlm
from decode.complete import as_finished
from decode.core.requests import Prompt, encode
from dlm.lm import LanguageModel
from dlm.tasks.jsonl import read_records


def draw(
    lm: LanguageModel, prompts: Sequence[Prompt], gen_len: int, num: int, batch_size: int
) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """The number of a prompt, and a text behind it; `num` of each prompt."""
    ids = [encode(lm, prompt) for prompt in prompts]
    found = as_finished(
        lm, ids,
        gen_len=gen_len, temperature=1.0, num_return=num, seed=[i * num for i in range(len(ids))],
        batch_size=batch_size, progress=True,
    )  # fmt: skip
    for i, first in found:
        for one in (first, *first.others):
            yield i, {"prompt": ids[i], "completion": one.canvas.tolist()}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    said = flags.FLAGS
    try:
        lm = dlm.load(said.checkpoint)
        prompts = [record.get("prompt", "") for _, record in read_records(said.prompts)]
        num_valid = -(-len(prompts) // 20)
        texts = [*draw(lm, prompts, said.gen_len, said.num_samples, said.batch_size)]
        folder = pathlib.Path(said.out)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "valid"):
            some = [text for i, text in texts if (i < num_valid) == (name == "valid")]
            lines = "".join(json.dumps(text) + "\n" for text in some)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    ended = sum(text["completion"][-1] in lm.cfg.eos_ids for _, text in texts)
    print(f"{said.out}: {len(texts)} texts, of which {ended} ended within {said.gen_len} tokens")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "For dlm.load.", required=True)
    flags.DEFINE_string("prompts", None, "JSON lines.", required=True)
    flags.DEFINE_string("out", None, "Folder of the texts.", required=True)
    flags.DEFINE_integer("gen_len", 192, "Most tokens of a text.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 1, "Texts of every prompt.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Rows at once.", lower_bound=1)
    app.run(main)
