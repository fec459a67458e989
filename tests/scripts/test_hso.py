"""Perplexities with moving states: a table of a small model on small texts."""

import pytest

import dlm
from decode.core.hso import HSO
from decode.evaluation.tables import read_markdown
from decode.long_likelihood import long_log_likelihood
from dlm.tokenizer import byte_tokenizer
from tests.lib.mains import run_main
from tests.lib.untrained import tiny


def test_the_table_is_of_plain_reading_and_of_rates(tmp_path):
    dlm.save(tmp_path / "model", lm := tiny(byte_tokenizer(), 64))
    text = "the cat sat on the mat. " * 8
    (tmp_path / "a.txt").write_text(text)
    asks = [f"--checkpoint={tmp_path / 'model'}", "--window=8", "--context=32", "--num_tokens=60"]
    said = run_main("scripts.hso", *asks, "--etas=0.05", str(tmp_path / "a.txt"))
    plain, moved = read_markdown(said)[0]
    tokens = lm.tokenizer.encode_begin(text)[:60]
    for row, hso in ((plain, None), (moved, HSO(eta=0.05))):
        (right,) = long_log_likelihood(lm, [tokens], hso=hso, window=8, context=32)
        assert row["perplexity"] == f"{right.perplexity:.2f}"
    assert plain["over plain"] == "1.0000 (1.0000 to 1.0000)" and plain["time"] == "1.0"
    ratio = float(moved["perplexity"]) / float(plain["perplexity"])
    assert float(moved["over plain"].split()[0]) == pytest.approx(ratio, rel=1e-3)
    low, high = map(float, moved["over plain"].split("(")[1].strip(")").split(" to "))
    assert low <= float(moved["over plain"].split()[0]) <= high and moved["eta"] == "0.05"


def test_what_is_wrong_is_said(tmp_path):
    dlm.save(tmp_path / "model", tiny(byte_tokenizer(), 64))
    flag = f"--checkpoint={tmp_path / 'model'}"
    assert "error: " in run_main("scripts.hso", flag, str(tmp_path / "b.txt"), code=1)
    assert "name at least one text file" in run_main("scripts.hso", flag, code=1)
