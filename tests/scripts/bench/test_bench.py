"""Every benchmark gives a row per case, with what its table shows."""

import dataclasses
import json
import sys
import types

import pytest

from decode.diffusion.components import Threshold
from dlm.presets import PRESETS
from dlm.tasks.waiting_line import WaitingLine
from scripts.bench import decode, diffusion, kernels, models, prompts, refill, spec, train, windows
from scripts.bench.timing import table
from tests.lib.mains import run_main
from tests.lib.untrained import untrained

TINY = PRESETS["tiny"]


def test_a_flag_that_a_benchmark_does_not_read_is_refused():
    said = run_main("scripts.bench", "decode", "--repeats=5", "--checkpoint=smollm2", code=1)
    assert "decode reads no --checkpoint; it reads batch, block_len" in said
    said = run_main("scripts.bench", "windows", "--checkpoint=here", "--preset=llada_8b", code=1)
    assert "error: --checkpoint=here and --preset=llada_8b both say the model" in said


@pytest.mark.exhaustive
def test_decode_has_a_step_and_a_whole_decode_per_cache():
    rows = [*decode.bench_decode(TINY, [2], prompt_len=8, gen_len=16, block_len=8, repeats=5)]
    assert [(r["case"], r["cache"]) for r in rows] == [
        (case, cache) for cache in ("none", "prefix", "dual") for case in ("step", "decode")
    ]
    for row in rows:
        assert {"device", "dtype", "batch", "ceiling_gflops", "ceiling_gb_per_s"} <= row.keys()
    assert table(rows, "step", decode.STEP_COLUMNS).count("\n") == 4
    assert table(rows, "decode", decode.DECODE_COLUMNS).count("| quota |") == 3


@pytest.mark.exhaustive
def test_spec_times_trees_of_every_size_and_drafters():
    rows = [*spec.bench_spec(TINY, dataclasses.replace(TINY, n_layers=2), [2], 64, repeats=5)]
    free = [row["nodes"] for row in rows if row["drafter"] == "none"]
    assert free == [1, 8, 32, 64]
    assert {row["drafter"] for row in rows} >= {"Medusa", "Hydra", "EAGLE-3", "DFlash"}
    assert all(row["round_ms"] > 0 and row["break_even"] > 0 for row in rows)
    assert table(rows, "spec", spec.COLUMNS).count("\n") == len(rows) + 1


@pytest.mark.exhaustive
def test_refilled_rows_give_the_same_answers_in_fewer_rounds():
    lm = untrained(WaitingLine())
    asked, gen_len = prompts.some_prompts(lm, "waiting_line", "", 12, 0, block_len=8)
    method = refill.method_of(lm, 8).replace(rule=Threshold(0.05))  # of an untrained model
    row = refill.bench_refill(lm, method, asked, gen_len, rows=4, repeats=1)
    assert row["same_answers"] and 0 < row["full_rounds"] < row["static_rounds"]
    assert row["static_occupancy"] < row["occupancy"] <= 1 and row["compile_s"] > 0
    assert table([row], "refill", refill.COLUMNS).count("\n") == 2


@pytest.mark.exhaustive
def test_windows_of_every_width_and_text():
    lm = models.load("", dataclasses.replace(TINY, max_seq_len=1100), "")
    rows = [*windows.bench_windows(lm, repeats=5)]
    expected = [(1, 100), (4, 100), (8, 100), (32, 100), (1, 1000), (1000, 0)]
    assert [(row["window"], row["behind"]) for row in rows] == expected
    assert all(row["ms"] > 0 and row["floor_ms"] >= 0 for row in rows)
    assert [row["behind"] for row in rows if row["over_short"] is not None] == [1000]
    assert table(rows, "windows", windows.COLUMNS).count("\n") == len(rows) + 1


@pytest.mark.exhaustive
def test_train_compares_steps_with_their_products():
    rows = [*train.bench_train("tiny", TINY, (2, 8, 16), repeats=5)]
    assert [(r["model"], r["remat"]) for r in rows] == [
        (model, remat) for model in ("waiting_line", "tiny") for remat in (True, False)
    ]
    for row in rows:
        assert row["step_ms"] > 0 and row["products_gflops"]
        assert row["gflop"] >= row["needed_gflop"]
        assert (row["input_wait"] is None) == (row["model"] == "tiny")
    assert table(rows, "train", train.COLUMNS).count("\n") == 5


@pytest.mark.exhaustive
def test_kernels_report_every_case_and_what_failed(tmp_path):
    kernels.run(is_toy=True, calls=32, only="toy block ", out=str(tmp_path), repeats=5)
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"attention", "stats"}
    assert "| attention | toy block | default |" in (tmp_path / "kernels.md").read_text()
    for row in rows:
        if row["implementation"] != "tokamax":  # the only one that may be missing
            assert row["status"] == "ok", row
            assert row["us"] > 0 and row["bytes"] > 0 and row["ceiling_gb_per_s"] > 0
        if row["implementation"] in ("default", "xla"):
            assert row["error"] < 1e-2


def test_code_for_another_transformers_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "generate.py").write_text(
        "class LLaDAModelLM:\n"
        "    def from_pretrained(*given, **options):\n"
        "        raise AttributeError('no such weights')\n"
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(float32=None))
    monkeypatch.delitem(sys.modules, "generate", raising=False)
    monkeypatch.setattr(diffusion, "version", lambda name: "5.24")
    cfg = dataclasses.replace(TINY, mask_token_id=1)
    message = r"with transformers 5\.24, .*AttributeError: no such weights"
    with pytest.raises(ValueError, match=message):
        next(diffusion.bench_diffusion(cfg, str(tmp_path), 8, 8, 4, 5))
