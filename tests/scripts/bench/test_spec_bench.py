"""Drafters on prompts by category: what is read, what is reported, and what parts from plain."""

import json

import jax
import numpy as np
import pytest

from dlm.lm import LanguageModel
from scripts.bench import prompts, spec_bench, spec_report
from tests.lib.speculation import random_prompts
from tests.lib.untrained import byte_lm, char_lm


def test_questions_of_spec_bench_have_six_categories(tmp_path):
    lines = [
        {"category": c, "turns": [f"{c} {i}", "and then?"]}
        for c in ("writing", "math", "rag", "qa")
        for i in range(3)
    ]
    file = tmp_path / "question_dev.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    found = prompts.read_questions(tmp_path)
    assert {c: len(texts) for c, texts in found.items()} == {"multi-turn": 6, "rag": 3, "qa": 3}
    file.write_text("\n".join(map(json.dumps, lines[:6])))  # of another set they stay what they are
    assert list(prompts.read_questions(tmp_path)) == ["writing", "math"]
    for line, message in (
        ({"turns": ["a"]}, r"dev\.jsonl, line 1: category=None must be a name"),
        ({"category": "qa"}, r"line 1: turns=None must be a list of texts"),
        ({"category": "qa", "turns": []}, r"line 1: turns=\[\] must be a list of texts"),
    ):
        file.write_text(json.dumps(line))
        with pytest.raises(ValueError, match=message):
            prompts.read_questions(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="has no question"):
        prompts.read_questions(tmp_path)


def test_prompts_that_are_too_long_are_passed_over(capsys):
    lm = char_lm()
    texts = ["a" * 5, "b" * 2040, "c" * 2030, "d" * 5]
    found = prompts.sample_prompts(lm, {"long": texts[1:3], "some": texts}, 3, gen_len=8)
    assert [len(tokens) for tokens in found["some"]] == [22, 22]
    assert list(found) == ["some"]
    said = capsys.readouterr().out
    assert "some: 2 prompts are passed over, which with gen_len=8 are longer than" in said
    with pytest.raises(ValueError, match="max_seq_len=2048 of the model is less than"):
        prompts.sample_prompts(lm, {"long": texts[1:3]}, 1, gen_len=8)


def test_so_many_prompts_of_whatever_is_asked(tmp_path):
    """Of questions all categories in like parts, in no order."""
    lm = char_lm()
    lines = [{"category": c, "turns": [c * i]} for c in "abc" for i in range(1, 6)]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found, gen_len = prompts.some_prompts(lm, "", str(tmp_path), 8, 5)
    of = [lm.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in found]
    assert sorted(sum(c in text for text in of) for c in "abc")[0] >= 2 and of != sorted(of)
    assert len({*map(tuple, found)}) == 8 and gen_len == 5
    assert len(prompts.some_prompts(byte_lm(), "", "", 3, 5)[0]) == 3
    with pytest.raises(ValueError, match=r"--task=scan and --prompts=x both say what is asked"):
        prompts.some_prompts(lm, "scan", "x", 3, 5)


@pytest.mark.exhaustive
def test_every_method_has_a_row_per_category(toy_cfg, toy_params, tmp_path):
    """Drafts change nothing; a decoder that writes something else is listed, with its margin."""
    lm = LanguageModel(toy_params, toy_cfg)
    some = random_prompts(toy_cfg, 3)
    asked = {"short": some[:2], "long": some[2:]}
    methods = spec_bench.methods_of(["prompt_lookup"], ["off", "on"])
    others = {"other": lambda prompt: ([1, 2, 3], 3, 0.5)}
    log = tmp_path / "log.jsonl"
    found = [*spec_bench.measure(lm, methods, asked, 8, 2, others, log)]
    names = ["plain", "prompt_lookup", "prompt_lookup, controlled", "other"]
    assert [m.method for m in found] == names * 3
    assert all(len(m.seconds) == 2 for m in found)
    rows = {(row["category"], row["method"]): row for row in spec_report.summary(found, asked)}
    assert {category for category, _ in rows} == {"short", "long", "all"}
    for category in ("short", "long", "all"):
        plain = rows[category, "plain"]
        assert plain["tau"] == plain["share"] == plain["break_even"] == 1
        for name in names[1:3]:
            row = rows[category, name]
            assert row["tau"] >= 1 and row["same_text"] == row["prompts"]
            for what in ("tau", "tokens_per_s"):
                low, high = row[f"{what}_interval"]
                assert low <= row[what] <= high
            np.testing.assert_allclose(row["share"] * row["break_even"], row["tau"], rtol=1e-6)
        assert rows[category, "other"]["same_text"] == 0
    assert sum(rows["all", names[2]]["widths"].values()) == sum(
        m.num_forwards for m in found if m.method == names[2]
    )
    assert spec_report.table([*rows.values()]).count("\n") == 1 + len(rows)
    for controlled, num in ((False, 2), (True, 1)):  # the other library has no controller
        matrix = spec_report.by_category([*rows.values()], controlled).splitlines()
        assert matrix[0].replace(" ", "") == "|method|short|long|all|" and len(matrix) == 2 + num
    spec_report.draw([*rows.values()], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))  # interrupted
    again = [*spec_bench.measure(lm, methods, asked, 8, 2, others, log)]
    assert again[:8] == found[:8] and again[8].seconds != found[8].seconds
    assert [*spec_bench.measure(lm, methods, asked, 8, 2, others, log)] == again
    others["another"] = others["other"]
    more = [*spec_bench.measure(lm, methods, asked, 8, 2, others, log)]  # beside another library
    assert len(more) == 15 and more[0].seconds != again[0].seconds
    listed = spec_report.divergences(found)
    assert len(listed) == 3 and all(s.startswith("other, ") and "nats" in s for s in listed)


@pytest.mark.exhaustive(every=4)
def test_programs_are_kept_for_one_length_at_a_time(toy_cfg, toy_params, monkeypatch):
    """Prompts that are padded to the same length follow each other; then programs are dropped."""
    lm, order, dropped = LanguageModel(toy_params, toy_cfg), [], []
    monkeypatch.setattr(spec_bench, "SHORTEST", 4)
    monkeypatch.setattr(jax, "clear_caches", lambda: dropped.append(len(order)))
    collect = spec_bench.collect
    noted = lambda state, *rest: order.append(state.prompt_len.item()) or collect(state, *rest)
    monkeypatch.setattr(spec_bench, "collect", noted)
    asked = {"long": [[1] * 7, [1] * 3], "short": [[2] * 2, [2] * 6]}
    plain = spec_bench.methods_of([], ["off"])
    found = [*spec_bench.measure(lm, plain, asked, 4, 1, {})]
    assert order == [3, 2, 7, 6] and dropped == [2]
    rows = spec_report.summary(found, asked)
    assert [(row["category"], row["prompts"]) for row in rows] == [
        ("long", 2), ("short", 2), ("all", 4)
    ]  # fmt: skip


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"controller=.* must be of on and off"):
        spec_bench.methods_of(["suffix"], ["maybe"])
    with pytest.raises(ValueError, match="there is no method"):
        spec_bench.methods_of(["suffixx"], ["on"])
