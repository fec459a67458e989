"""The commands a newcomer types, shrunk to seconds, as subprocesses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.lib.commands import run
from tests.lib.paths import ROOT


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A smoke run of the quickstart."""
    path = tmp_path_factory.mktemp("quickstart")
    out = run("scripts.quickstart", f"--workdir={path}", "--smoke")
    (path / "stdout.txt").write_text(out)
    return path


@pytest.mark.slow
@pytest.mark.exhaustive
def test_quickstart_writes_what_it_says(workdir):
    out = (workdir / "stdout.txt").read_text()
    assert "| one per step" in out and "speed-up" in out and "Act two" in out
    results = json.loads((workdir / "results.json").read_text())
    assert len(results["rows"]) == 6
    assert all(0 <= a <= 1 for row in results["rows"] for a in row["accuracy"].values())
    for row in results["rows"]:
        assert row["forwards_per_answer"] > 0 and row["seconds"] > 0
    assert (workdir / "speed_quality.png").read_bytes().startswith(b"\x89PNG")
    assert (workdir / "commit_order.html").stat().st_size > 1000
    assert (workdir / "results.csv").read_text().count("\n") == 7


@pytest.mark.slow
@pytest.mark.exhaustive
def test_ask_decodes_your_own_line(workdir):
    flags = [f"--checkpoint={workdir / 'train/model'}", "--operation=insert_index"]
    people = "--people=Alice Young, Zoe Parker, Liam Davis"
    out = run("scripts.ask", *flags, people, "--person=Nora Evans", "--index=1", "--cache=dual")
    assert "forwards; surest first" in out
    out = run("scripts.ask", *flags, people, "--person=Nora Evans", "--index=9", ok=False)
    assert "index=9 must be in [0, 3]" in out and "Traceback" not in out


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_second_start_of_the_quickstart_compiles_nothing(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_PLATFORMS": "cpu", "DLM_PROGRAMS": str(tmp_path / "programs")}
    command = [sys.executable, "-m", "scripts.quickstart", f"--workdir={tmp_path}", "--smoke"]

    def programs() -> set[str]:
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
        return {file.name for file in (tmp_path / "programs").rglob("*-cache")}

    first = programs()
    assert len(first) > 20
    assert programs() == first  # whatever is compiled is kept


@pytest.mark.exhaustive
def test_quickstart_spec_writes_the_same_text_with_every_drafter(tmp_path):
    flags = [f"--workdir={tmp_path}", f"--out={tmp_path}", "--smoke", "--tasks=scan"]
    out = run("scripts.quickstart_spec", *flags, "--heads=all")
    assert "| Hydra, tree" in out and "| NO" not in out
    folder = tmp_path / "scan" / "seed0"
    results = json.loads((folder / "results.json").read_text())
    assert len(results["rows"]) == 14 and results["about"]["task"] == "scan"
    for row in results["rows"]:
        assert row["is_identical"] and sum(row["accepted"]) == pytest.approx(1)
        assert row["acceptance_length"] >= 1 and row["seconds"] > 0
    assert results["rows"][0]["forwards"] >= max(row["forwards"] for row in results["rows"])
    assert (folder / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "results.csv").read_text().count("\n") == 15
    page = (tmp_path / "drafters.md").read_text()
    assert "## scan" in page and "| EAGLE-3, tree" in page and "## python" not in page
    wrong = run("scripts.quickstart_spec", *flags, "--heads=medusae", ok=False)
    assert "--heads has 'medusae'; there are medusa, hydra" in wrong
