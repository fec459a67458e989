"""`scripts.pearl` measures programs, adds them up as two devices would, and draws them."""

import json

import pytest

from tests.lib.mains import run_main
from tests.lib.paths import GOLDEN


@pytest.mark.exhaustive(every=4)
def test_numbers_and_picture(tmp_path):
    said = run_main(
        "scripts.pearl", f"--target={GOLDEN / 'llama_target'}", f"--out={tmp_path}",
        f"--draft={GOLDEN / 'llama_draft'}", "--prompt=3 5 8", "--gen_len=9", "--repeats=1",
        "--num_drafts=2",
    )  # fmt: skip
    assert "two_devices" in said and (tmp_path / "pearl.png").stat().st_size > 5000
    found = json.loads((tmp_path / "pearl.json").read_text())
    seconds, total, rounds = found["seconds"], found["total"], len(found["tokens"])
    assert sum(found["tokens"]) == found["rounds"]["plain"] == 9
    between = seconds["settle"] + seconds["follow"]
    at_once = rounds * (max(seconds["draft"], seconds["judge"]) + between)
    assert total["two_devices"] == pytest.approx(at_once)
    assert total["one_device"] == pytest.approx(
        rounds * (seconds["draft"] + seconds["judge"] + between)
    )
