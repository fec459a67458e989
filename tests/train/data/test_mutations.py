"""JSON lines changed at random: examples, or one sentence that names the line."""

import json

import pytest

from dlm.tasks.jsonl import JsonlTask, gsm8k, mbpp
from dlm.tokenizer import byte_tokenizer
from tests.lib.mutations import AT_RANDOM, changed, damaged, outcome, to_json, try_all
from train import data

RECORDS = {
    gsm8k: {"question": "How many? \u2028 7", "answer": "3 + 4 = 7\n#### 7"},
    mbpp: {
        "task_id": 1, "text": "Add.", "code": "def add(a, b):\n    return a + b",
        "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(1, 1) == 2"],
    },
}  # fmt: skip


@AT_RANDOM
@pytest.mark.parametrize("make", RECORDS)
def test_lines(tmp_path, num, make):
    """Others than the changed line stay what they are."""
    file, record = tmp_path / "data.jsonl", RECORDS[make]
    tokenizer, rest = byte_tokenizer(), to_json(record)
    file.write_bytes(rest)
    whole = make(file)[0]

    def test(rng):
        line = to_json(changed(rng, record))
        if rng.random() < 0.5:
            line = damaged(rng, line)
        if rng.random() < 0.1:
            line = b"\xef\xbb\xbf" + line
        file.write_bytes(rest + b"\r\n" + line + b"\n\n" + rest)
        task = outcome(make, file)
        if task is None:
            return
        assert isinstance(task, JsonlTask) and task[0] == task[len(task) - 1] == whole
        data.describe(task)
        for index in range(len(task)):
            scores = task.score(task[index], whole.completion)
            assert 0 <= scores["score"] <= 1
            row = data.encode_example(task[index], tokenizer, 400, 200, cut=True)
            assert row["prompt"].shape == (400,) and row["completion"].shape == (200,)

    try_all(num, test)


DEEP = [
    b"[" * 100_000,
    b'{"question": ' + b"9" * 5000 + b', "answer": "x"}',
    b'{"question": "\\ud83d", "answer": "x"}',
    b'{"question": "a\xff", "answer": "x"}',
    b'{"question": ["a"], "answer": "x"}',
    b'{"question": {"a": "b"}, "answer": "x"}',
    b'{"question": null, "answer": "x"}',
    b'{"answer": "x"}',
    b'[{"question": "a", "answer": "x"}]',
    b'{"question": "a", "answer": "x"',
    b'{"question": "a", "answer": "x"} {}',
    b"PK\x03\x04",
]
MESSAGES = [
    *("not valid JSON", "not valid JSON", "half of a character", "not UTF-8"),
    *("'question' of the template is a list", "is a dict", "is null", "lacks the field 'question'"),
    *("must hold a JSON object, got list", "not valid JSON", "not valid JSON", "not valid JSON"),
]


@pytest.mark.parametrize(
    ("line", "message"), zip(DEEP, MESSAGES, strict=True), ids=range(len(DEEP))
)
def test_odd_lines_are_named(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(RECORDS[gsm8k]).encode() + b"\n\n" + line)
    with pytest.raises(ValueError, match=rf"data.jsonl, line 3: .*{message}"):
        gsm8k(file)
