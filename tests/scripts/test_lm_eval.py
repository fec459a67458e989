"""`scripts.lm_eval` without the harness: exports, and what is missing."""

import sys

import pytest

import dlm
from dlm.tasks.presets import TASKS
from tests.lib.mains import run_main
from tests.lib.untrained import untrained


def test_a_task_is_exported(tmp_path):
    flags = [f"--out={tmp_path}", "--task=word_problems", "--limit=3"]
    said = run_main("scripts.lm_eval", "export", *flags)
    assert f"Written: word_problems in {tmp_path}" in said
    assert (tmp_path / "word_problems.test.jsonl").read_text().count("\n") == 3
    run_main("scripts.lm_eval", "export", *flags, "--choices=2")
    assert (tmp_path / "word_problems_choice.yaml").is_file()
    said = run_main("scripts.lm_eval", "export", f"--out={tmp_path}", code=1)
    assert "error: there is no task ''; there are waiting_line" in said and "Traceback" not in said


@pytest.mark.parametrize("word", ["exports", "run"])
def test_other_words_are_refused(word):
    assert "takes only flags" in run_main("scripts.lm_eval", word, code=1)


def test_without_the_harness_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "decode.evaluation.lm_eval", raising=False)
    dlm.save(tmp_path / "model", untrained(TASKS["word_problems"].make()))
    flags = [f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path}", "--tasks=a"]
    said = run_main("scripts.lm_eval", *flags, code=1)
    assert said == ("error: lm-eval is not installed: install the extra, pip install -e '.[eval]'")
