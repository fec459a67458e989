"""The quickstart's second act, with a model that takes seconds."""

import re

from scripts.quickstart import real_model
from scripts.quickstart.real_model import table, watch
from tests.lib.untrained import char_lm


def test_one_text_with_every_drafter(capsys):
    names = ["plain", "prompt_lookup", "token_recycling"]
    rows = watch(char_lm(), "hello there", names, gen_len=24)
    shown = dict(
        re.findall(r"^-- (\w+): compiling took [\d.]+ s\n(.*)$", capsys.readouterr().out, re.M)
    )
    assert list(shown) == names and len(set(text.replace("|", "") for text in shown.values())) == 1
    for row, text in zip(rows, shown.values(), strict=True):
        assert row.is_same and row.num_tokens == len(text.replace("|", "")) > 8
        if row.drafter == "plain":
            assert "|" not in text and row.num_forwards >= row.num_tokens
        else:  # a bar between forwards, of which the last may bring nothing but the end
            assert row.num_forwards - text.count("|") == 1
        assert row.tokens_per_s > 0
    assert rows[2].num_forwards < rows[0].num_forwards
    assert table(rows).count("| yes ") == 3


def test_without_the_model_one_sentence_says_so(capsys, monkeypatch, tmp_path):
    def missing():
        raise FileNotFoundError("SmolLM2 is not installed: do this")

    monkeypatch.setattr(real_model, "installed_smollm2", missing)
    real_model.act_two(tmp_path, False)
    assert capsys.readouterr().out == (
        "\nAct two, a real model, is left out: SmolLM2 is not installed: do this.\n"
    )
    assert not list(tmp_path.iterdir())
