"""`scripts.drawn_drafts` has every way to draw, and counts what was accepted."""

import pytest

from tests.lib.mains import run_main
from tests.lib.paths import GOLDEN


@pytest.mark.exhaustive(every=4)
def test_the_table(tmp_path):
    (tmp_path / "prompts.txt").write_text("3 5 8\n4 1\n")
    flags = [f"--{x}={GOLDEN / f'llama_{x}'}" for x in ("target", "draft")]
    flags += [f"--prompts={tmp_path / 'prompts.txt'}", "--depth=3", "--gen_len=12"]
    said = run_main("scripts.drawn_drafts", *flags, "--num_return=3")
    lines = [[cell.strip() for cell in x.split("|")[1:-1]] for x in said.splitlines() if "|" in x]
    rows = [row for row in lines if row[0].startswith(("chain", "two"))]
    assert [(row[0][:9], row[2]) for row in rows] == [
        *[("chain", "3")] * 2, *[("two chain", "6")] * 2, *[("two beams", "6")] * 2,
    ]  # fmt: skip
    assert all(1 <= float(row[3].split()[0]) <= 4 and row[5] == "6" for row in rows)
    assert all(float(row[4]) >= 3 for row in rows)  # one per level

    (tmp_path / "prompts.txt").write_text("\n")
    assert "has no line with a prompt" in run_main("scripts.drawn_drafts", *flags, code=1)
