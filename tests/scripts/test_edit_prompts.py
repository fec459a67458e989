"""Prompts of edits, and texts for a datastore, from files of a few lines."""

import json
import pathlib

import pytest

from dlm.tasks.code_edits import CodeEdits
from dlm.tasks.rewriting import CLOSING, OPENING, jfleg
from scripts.bench.prompts import read_questions
from scripts.edit_prompts import questions
from scripts.rest_datastore import read_texts


def test_prompts_are_those_of_the_bench(tmp_path):
    for name in ("src", *(f"ref{i}" for i in range(4))):
        (tmp_path / f"dev.{name}").write_text("He go .\nShe goes .\nThey go .\n")
    record = {"text": "Add.", "code": "def f(a, b):\n    return a + b"}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(record) + "\n")
    tasks = {"jfleg": jfleg(tmp_path), "mbpp": CodeEdits(tmp_path / "mbpp.jsonl")}
    found = questions(tasks, 2)
    assert [question["question_id"] for question in found] == [0, 1, 2]
    for question in found:
        (prompt,) = question["turns"]
        source = prompt.partition(OPENING)[2].rpartition(CLOSING)[0]
        assert source == question["source"] and question["reference"]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in found))
    assert {name: len(some) for name, some in read_questions(tmp_path).items()} == {
        "jfleg": 2, "mbpp": 1
    }  # fmt: skip


def test_texts_of_folders_and_of_json_lines(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in (("b.txt", "two"), ("deep/a.txt", "three"), ("c.py", "x = 1"), ("d.md", "")):
        (tmp_path / name).write_text(text)
    assert sorted(read_texts(tmp_path, "")) == ["three", "two", "x = 1"]
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"q": "a", "r": "b"}\n{"q": "c"}\n')
    texts = read_texts(lines, "{q} {r}")
    assert next(texts) == "a b"
    with pytest.raises(ValueError, match="line 2"):
        next(texts)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no file that ends with \.txt or \.py"):
        list(read_texts(tmp_path / "empty", ""))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        list(read_texts(pathlib.Path(tmp_path / "nowhere"), ""))
