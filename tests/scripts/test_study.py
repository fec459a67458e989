"""The study: how settings are picked, by hand; and all of it once, on models of a few steps."""

import jax
import numpy as np
import pytest

import dlm
from decode.evaluation.run import device
from scripts.study import make, measure, page
from scripts.study.measure import BASELINE, Measured
from tests.lib.commands import run
from train.collect.records import read_settings


def measured(system, setting, score, forwards):
    tokens = np.full(len(score), 6.0)
    return Measured(system, setting, np.array(score, float), np.array(forwards, float), tokens)


def a_study():
    """Two examples to pick on, two to report; every system but one has one setting."""
    others = [s for s in measure.SYSTEMS if s != "base + threshold"]
    return [
        measured(BASELINE, BASELINE, [1, 1, 1, 0], [8, 8, 8, 8]),
        measured("base + threshold", "0.5", [1, 0, 1, 1], [1, 1, 1, 1]),
        measured("base + threshold", "0.9", [1, 1, 0, 1], [4, 4, 2, 2]),
        measured("base + threshold", "0.95", [1, 1, 1, 1], [6, 6, 6, 6]),
        *(measured(system, measure.PUBLISHED[system], [0, 1, 1, 1], [2, 2, 4, 4])
          for system in others),
    ]  # fmt: skip


def test_settings_are_picked_on_other_examples():
    picked = measure.pick(a_study(), 2)
    # 0.5 is fastest but loses an answer there; 0.9 does not, although it does later.
    assert picked["base + threshold"].setting == "0.9"
    assert picked["dParallel"].setting == "0.5"  # nothing is good enough: the most accurate
    lines = page.table([a_study()], 2, published=False).splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
             for line in lines}  # fmt: skip
    assert cells[BASELINE] == ["", "50.0", "0.0", "8.00", "0.75", "1.00"]
    assert cells["base + threshold"] == ["0.9", "50.0", "0.0", "2.00", "3.00", "4.00"]
    assert cells["Learn2PD"] == ["0.96", "100.0", "50.0", "4.00", "1.50", "2.00"]
    goals = page.goals([a_study()], 2)
    assert "2.00x" in goals and "0.50x" in goals and "-50.0" in goals


def test_groups_keep_their_own_examples():
    part = page.restrict(a_study(), [1, 3])
    assert part[1].score.tolist() == [0, 1] and part[1].forwards.tolist() == [1, 1]


@pytest.mark.exhaustive
def test_the_whole_study_once_and_once_more(tmp_path):
    folder = tmp_path / "waiting_line" / "seed0"
    make.make("waiting_line", "small", 0, folder, smoke=True)
    found = measure.measure("waiting_line", folder, 16)
    assert {m.system for m in found} == {BASELINE, *measure.SYSTEMS}
    assert all(len(m.score) == 16 and (m.forwards >= 1).all() for m in found)
    base = dlm.load(folder / "base" / "model")
    settings = read_settings(folder / "rounds")
    assert settings["model"] == dlm.fingerprint(base) and settings["oracle"]

    times = {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    log = (folder / "measured.jsonl").read_text()
    make.make("waiting_line", "small", 0, folder, smoke=True)
    again = measure.measure("waiting_line", folder, 16)
    assert (folder / "measured.jsonl").read_text() == log
    assert [m.forwards.tolist() for m in again] == [m.forwards.tolist() for m in found]
    assert times == {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}

    out = tmp_path / "out"
    run(
        "scripts.study", "--smoke", "--tasks=waiting_line", "--seeds=0", f"--workdir={tmp_path}",
        f"--out={out}",
    )  # fmt: skip
    assert (folder / "measured.jsonl").read_text() == log
    text = (out / "study.md").read_text()
    assert text.count("| dParallel ") >= 2 and "## waiting_line" in text
    assert (out / "study_waiting_line.png").stat().st_size > 10_000


def test_the_page_names_model_and_device(tmp_path, toy_cfg, toy_params):
    dlm.save(tmp_path / "base" / "model", dlm.LanguageModel(toy_params, toy_cfg))
    assert page.about(tmp_path) == f"0.00 M parameters, float32, {device()}"
    with jax.default_matmul_precision("highest"):
        assert "float32 (matmul precision highest)" in page.about(tmp_path)


def test_a_run_of_some_tasks_keeps_the_sections_of_the_others(tmp_path):
    file = tmp_path / "study.md"
    assert page.read_sections(file) == {}
    file.write_text("# Title\n\nText.\n\n## scan\n\nOld.\n\n| a |\n\n## waiting_line\n\nMore.\n")
    assert page.read_sections(file) == {
        "scan": "scan\n\nOld.\n\n| a |",
        "waiting_line": "waiting_line\n\nMore.",
    }
