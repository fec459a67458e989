"""Executes the notebooks and stores in them what they show.

    make notebooks
    python -m scripts.run_notebooks notebooks/first_decode.ipynb

Each is run from top to bottom in a kernel of its own, in its folder. What is stored holds no
progress bars and no warnings, and nothing at all is stored of a notebook in which a cell fails or
shows a path of this machine. Needs the extra `notebook`.
"""

from __future__ import annotations

import pathlib
import re
import sys
import time
from typing import Any

from absl import app

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|mnt|opt|srv|usr|var|work|Users)/[\w./-]*")


def main(argv: list[str]) -> None:
    try:
        import nbclient
        import nbformat
    except ImportError as error:
        sys.exit(f"error: {error}: pip install -e '.[notebook]'")
    for path in [pathlib.Path(name) for name in argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        began = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=None, record_timing=False, resources={"metadata": {"path": FOLDER}}
        )
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            sys.exit(f"error: {path}: {error}")
        clean(notebook)
        if found := machine_paths(notebook):
            sys.exit(f"error: {path} shows {found[0]}, a path of this machine")
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s", flush=True)


def clean(notebook: Any) -> None:
    """Takes out what means nothing: bars and warnings, versions, where printed text was cut."""
    notebook["metadata"]["language_info"] = {"name": "python"}
    for cell in code_cells(notebook):
        kept: list[Any] = []
        for output in cell["outputs"]:
            if output.get("name") == "stdout" and kept and kept[-1].get("name") == "stdout":
                kept[-1]["text"] += output["text"]
            elif output.get("name") != "stderr":
                kept.append(output)
        cell["outputs"] = kept


def code_cells(notebook: Any) -> list[Any]:
    """The cells with code, as nbformat 4 has them."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def machine_paths(notebook: Any) -> list[str]:
    """Absolute paths in the texts that cells show."""
    found: list[str] = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            shown = {"text/plain": output.get("text", ""), **output.get("data", {})}
            for kind, text in shown.items():
                if kind.startswith("text/"):
                    found += PATH.findall("".join(text))
    return found


if __name__ == "__main__":
    app.run(main)
