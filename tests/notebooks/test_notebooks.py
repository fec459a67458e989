"""The notebooks: their code runs with small settings, without Jupyter; what it shows is stored."""

import ast
import json
import os
import pathlib
import re
import sys
from typing import Any

import pytest

import dlm
from scripts.run_notebooks import FOLDER, clean, code_cells, machine_paths, main
from tests.lib.untrained import char_lm

PATHS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_500_000  # of all notebooks
SAID = {  # by notebooks that compare something with itself
    "draft_and_verify": "| prompt_lookup | yes       |",
    "many_devices": "4 of 4 answers are the same",
    "write_your_own": "Bigrams: same text: True",
}


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def execute(path: pathlib.Path, tiny: dict[str, Any]) -> dict[str, Any]:
    """Runs the code of a notebook, with other parameters, and what its cells show."""
    names: dict[str, Any] = {"__name__": "notebook"}
    for i, cell in enumerate(code_cells(read(path))):
        tree = ast.parse("".join(cell["source"]))
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"{path.name}, code cell {i}"
        exec(compile(tree, where, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert tiny.keys() <= names.keys(), f"{path.name} has no such parameters"
            names |= tiny
        if shown is not None:
            value = eval(compile(ast.Expression(shown.value), where, "eval"), names)
            getattr(value, "_repr_png_", lambda: None)()
    return names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Parameters of each notebook that make it a matter of seconds; one model serves them all."""
    folder = tmp_path_factory.mktemp("notebooks")
    writer = str(folder / "writer")
    dlm.save(writer, char_lm())
    train = {"RUN": str(folder / "train"), "VARIANT": "runlocal"}
    few = train | {"NUM_EXAMPLES": 20}
    write = {"MODEL": writer, "GEN_LEN": 12}
    return {
        "first_decode": train,
        "comparing_methods": few | {"METHODS": ("one_per_step", "quota_4")},
        "draft_and_verify": write
        | {"QUESTION": "to be or not to be, to be or not to be", "DRAFTERS": ("prompt_lookup",)},
        "train_filter_and_student": few
        | {
            "OUT": str(folder / "out"), "NUM_ANSWERS": 160, "ONLY_RIGHT": False,
            "STUDENT_STEPS": 5, "FILTER_STEPS": 20,
        },
        "write_your_own": few | write | {"TEXT": "to be or not to be"},
        "many_devices": train
        | {"NUM_PROMPTS": 4, "PLAN": ("--slices=v99:2x2",)},
    }  # fmt: skip


@pytest.mark.parametrize("name", [path.stem for path in PATHS])
def test_the_code_runs(name, tiny, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # put back, whatever they set
    monkeypatch.chdir(FOLDER)
    execute(FOLDER / f"{name}.ipynb", tiny[name])
    assert SAID.get(name, "") in capsys.readouterr().out


def test_there_are_parameters_for_all(tiny):
    assert [path.stem for path in PATHS] == sorted(tiny)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_stored_can_be_read(path):
    """From a run from top to bottom, without errors, warnings and traces of a machine."""
    notebook = read(path)
    assert notebook["cells"][0]["source"][0].startswith("# ")
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum(bool(cell["outputs"]) for cell in cells) >= 2
    assert machine_paths(notebook) == []
    prose = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"]
    for link in re.findall(r"\]\((?!http)(.*?)\)", "".join(prose)):
        assert (FOLDER / link).is_file(), link


def test_they_are_small():
    assert sum(path.stat().st_size for path in PATHS) < MOST_BYTES


def test_bars_warnings_and_paths():
    out = lambda name, text: {"output_type": "stream", "name": name, "text": text}
    image = {"output_type": "display_data", "data": {"image/png": "+/tmp/AAAA", "text/plain": "x"}}
    outputs = [out("stdout", "a"), out("stderr", "|###"), out("stdout", "b\n"), image]
    cell = {"cell_type": "code", "source": "", "outputs": outputs}
    notebook = {"metadata": {"language_info": {"version": "3.99"}}, "cells": [cell]}
    clean(notebook)
    assert cell["outputs"] == [out("stdout", "ab\n"), image]
    assert "3.99" not in str(notebook)
    assert machine_paths(notebook) == []
    for path in ("/root/x.py", "/home/me", "/tmp/a/b"):
        outputs[:] = [out("stdout", [f"in {path}:", "1"])]
        cell["outputs"] = outputs
        assert machine_paths(notebook) == [path]


def test_without_jupyter_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    with pytest.raises(SystemExit, match=r"^error: .*: pip install -e '\.\[notebook\]'"):
        main(["run_notebooks"])
