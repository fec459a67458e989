"""What searches explore: one prompt's tree for every strategy, as numbers and as pictures.

    python -m scripts.draw_search --checkpoint=smollm2 --out=docs

`search.json` gets the trees, and `search_NAME.png` are drawn from it, here and by
`python -m scripts.figures`.
"""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags

import dlm
from scripts.search_trees import FILE, PROMPT, explore, pictures
from train.host import only_flags


def main(argv: list[str]) -> None:
    only_flags(argv)
    given, out = flags.FLAGS, pathlib.Path(flags.FLAGS.out)
    dlm.keep_programs()
    try:
        numbers = explore(dlm.load(given.checkpoint), given.prompt, given.gen_len)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    text = json.dumps(numbers, ensure_ascii=False).replace("}, {", "},\n{")
    (out / FILE).write_text(text + "\n", encoding="utf-8")
    for draw in pictures(numbers, out).values():
        draw()


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "smollm2", "A folder, a file or a name, see dlm.load.")
    flags.DEFINE_string("prompt", PROMPT, "What is searched behind.")
    flags.DEFINE_integer("gen_len", 6, "Most tokens.")
    flags.DEFINE_string("out", "docs", "Folder for numbers and pictures.")
    app.run(main)
