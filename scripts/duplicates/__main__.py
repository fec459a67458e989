"""Says where the same code stands twice.

    python -m scripts.duplicates                     # fails if there is any
    python -m scripts.duplicates --length=8 train

A run is a number of lines of code one behind the other that have the same tokens but for names,
which must differ in the same way everywhere. Imports, docstrings, comments, blank lines and how
lines are indented do not count.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags

from scripts.duplicates.find import duplicates

PACKAGES = ("configs", "decode", "dlm", "kernels_pallas", "scripts", "train")


def main(argv: list[str]) -> None:
    roots = [pathlib.Path(name) for name in argv[1:] or PACKAGES]
    files = {str(file): file.read_text() for root in roots for file in sorted(root.rglob("*.py"))}
    found = list(duplicates(files, flags.FLAGS.length))
    for places in found:
        print(" and ".join(f"{name}:{first}-{last}" for name, first, last in places))
    if found:
        sys.exit(f"error: {len(found)} runs of {flags.FLAGS.length} lines or more stand twice")


if __name__ == "__main__":
    flags.DEFINE_integer("length", 12, "Lines of code that may not stand twice.", lower_bound=1)
    app.run(main)
