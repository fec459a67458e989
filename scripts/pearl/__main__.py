"""What PEARL would take on two devices, from times measured on one: numbers and a timeline.

    python -m scripts.pearl --target=smollm2 --draft=path/to/draft --prompt="Once upon a time" \\
        --out=runs/pearl

Writes pearl.json and pearl.png, and prints the seconds of one greedy text: plainly, by draft and
verify, and by PEARL on one device and on two. What the devices send each other, a few numbers per
row and round, is not in it.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

import dlm
from decode.core.requests import encode
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.pearl import Pearl
from scripts.pearl.measure import measure
from scripts.pearl.picture import draw


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    given = flags.FLAGS
    try:
        lm, draft = dlm.load(given.target), dlm.load(given.draft)
        prompt = encode(lm, given.prompt) if lm.tokenizer else [*map(int, given.prompt.split())]
        method = Pearl(DraftModel(draft.params, draft.cfg, num_drafts=given.num_drafts))
        found = measure(lm, method, prompt, given.gen_len, given.repeats)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    out = pathlib.Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pearl.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, out / "pearl.png")
    for name, seconds in found["total"].items():
        print(f"{name:12}{seconds:8.3f} s{found['total']['plain'] / seconds:7.2f} times plain")


if __name__ == "__main__":
    flags.DEFINE_string("target", None, "Folder of the target.", required=True)
    flags.DEFINE_string("draft", None, "Folder of the draft model.", required=True)
    flags.DEFINE_string("prompt", None, "The text to write on with.", required=True)
    flags.DEFINE_integer("num_drafts", 4, "Per round.", lower_bound=1)
    flags.DEFINE_integer("gen_len", 64, "Most tokens to write.", lower_bound=1)
    flags.DEFINE_integer("repeats", 9, "Of every measurement; the median counts.", lower_bound=1)
    flags.DEFINE_string("out", ".", "Folder of pearl.json and pearl.png.")
    app.run(main)
