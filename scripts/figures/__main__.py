"""Draws the figures of the documentation again, from the numbers that lie beside them.

    python -m scripts.figures                          all of them
    python -m scripts.figures --only=study_scan,pods   some

Measured again is nothing. Numbers are those of docs/*.json, which the commands on the pages write,
and of the tables on docs/quickstart.md and docs/methods.md. docs/window_masks.png is drawn by
`scripts.draw_masks`.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

from scripts.figures.pages import figures
from train.host import only_flags


def main(argv: list[str]) -> None:
    only_flags(argv)
    drawn = figures(pathlib.Path(flags.FLAGS.docs))
    if unknown := sorted(set(flags.FLAGS.only) - set(drawn)):
        sys.exit(f"error: --only has {unknown[0]!r}, which must be one of {', '.join(drawn)}")
    for name in flags.FLAGS.only or drawn:
        drawn[name]()


if __name__ == "__main__":
    flags.DEFINE_string("docs", "docs", "Folder of pages, numbers and figures.")
    flags.DEFINE_list("only", [], "Names of figures; default: all.")
    app.run(main)
