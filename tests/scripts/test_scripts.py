"""The commands a newcomer types, shrunk to seconds, as subprocesses."""

import json
import pathlib

import pytest

from tests.lib.commands import run


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
    assert "| one per step" in out and "speed-up" in out
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


@pytest.mark.exhaustive
def test_bench_prints_one_json_line_per_case():
    out = run(
        "scripts.bench", "decode", "--preset=tiny", "--batch=2", "--prompt_len=8",
        "--gen_len=16", "--block_len=8", "--repeats=5",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(r["case"], r["cache"]) for r in rows] == [
        (case, cache) for cache in ("none", "prefix", "dual") for case in ("step", "decode")
    ]
    for row in rows:
        assert {"device", "dtype", "batch", "ceiling_gflops", "ceiling_gb_per_s"} <= row.keys()
    assert run("scripts.bench", "nope", ok=False).count("are `decode`, `train` and `spec`") == 1


@pytest.mark.exhaustive
def test_bench_spec_times_trees_of_every_size_and_drafters():
    out = run("scripts.bench", "spec", "--preset=tiny", "--batch=2", "--repeats=5")
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    free = [row["nodes"] for row in rows if row["drafter"] == "none"]
    assert free == [1, 8, 32, 64]
    assert {row["drafter"] for row in rows} >= {"Medusa", "Hydra", "EAGLE-3", "DFlash"}
    assert all(row["round_ms"] > 0 and row["break_even"] > 0 for row in rows)


@pytest.mark.exhaustive
def test_bench_train_compares_steps_with_their_products():
    out = run(
        "scripts.bench", "train", "--preset=tiny", "--batch=2", "--prompt_len=8", "--gen_len=16",
        "--repeats=5",
    )  # fmt: skip
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(r["model"], r["remat"]) for r in rows] == [
        (model, remat) for model in ("waiting_line", "tiny") for remat in (True, False)
    ]
    for row in rows:
        assert row["step_ms"] > 0 and row["products_gflops"]
        assert row["gflop"] >= row["needed_gflop"]
        assert (row["input_wait"] is None) == (row["model"] == "tiny")


@pytest.mark.exhaustive
def test_bench_kernels_reports_every_case_and_what_failed(tmp_path):
    out = run(
        "scripts.bench_kernels", "--toy", "--repeats=5", f"--out={tmp_path}", "--only=toy block "
    )
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"attention", "stats"}
    assert "| attention | toy block | default |" in out
    for row in rows:
        if row["implementation"] != "tokamax":  # the only one that may be missing
            assert row["status"] == "ok", row
            assert row["us"] > 0 and row["bytes"] > 0 and row["ceiling_gb_per_s"] > 0
        if row["implementation"] in ("default", "xla"):
            assert row["error"] < 1e-2


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
