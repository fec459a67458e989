"""Writes the tables of the README and docs/ that are made from docstrings, between marker comments.

python -m scripts.docs_tables           # writes them
python -m scripts.docs_tables --check   # only fails if a page is stale
"""

import sys

from absl import app, flags

from scripts.docs_tables import tables

CHECK = flags.DEFINE_bool("check", False, "Write nothing; fail if a page is stale.")


def main(argv: list[str]) -> None:
    del argv
    stale = {page: text for page, text in tables.pages().items() if page.read_text() != text}
    if CHECK.value and stale:
        names = ", ".join(page.name for page in stale)
        sys.exit(f"stale: {names}. Write them with `python -m scripts.docs_tables`")
    for page, text in stale.items():
        page.write_text(text)


if __name__ == "__main__":
    app.run(main)
