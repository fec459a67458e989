import decimal
import json
import pathlib

import pytest

from dlm import tasks
from dlm.tasks import jsonl
from tests.lib.paths import SHARED

DATA = SHARED / "data"


def write(path: pathlib.Path, *records: object) -> pathlib.Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_templates(tmp_path):
    record = {"q": "a {b}\r\nc", "tests": ["one", "two"], "meta": {"x": 3}, "é": "ü\u2028"}
    path = write(tmp_path / "toy.jsonl", record, record)
    task = jsonl.JsonlTask(path, "{{{q}}} {tests[1]} {meta[x]}\n", "{é}")
    assert len(task) == 2
    assert task[1] == tasks.Example("{a {b}\nc} two 3\n", "ü\u2028", {"operation": "toy", **record})
    assert task.score(task[0], " ü ") == {"score": 1.0}
    assert task.score(task[0], "u") == {"score": 0.0}
    with pytest.raises(IndexError, match=r"index=2 must be in \[0, 2\)"):
        task[2]


def test_own_scorer(tmp_path):
    path = write(tmp_path / "toy.jsonl", {"q": "1"})
    task = jsonl.JsonlTask(path, "{q}", "{q}", lambda _, text: {"score": len(text) / 10})
    assert task.score(task[0], "12345") == {"score": 0.5}


def test_errors_name_file_and_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl' is not a file"):
        jsonl.JsonlTask(tmp_path / "nowhere.jsonl", "{q}", "{a}")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"q": 1}\n\n{"q": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: not valid JSON"):
        jsonl.JsonlTask(bad, "{q}", "{q}")
    bad.write_text('{"q": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: must hold a JSON object, got list"):
        jsonl.JsonlTask(bad, "{q}", "{q}")
    bad.write_text("\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl holds no records"):
        jsonl.JsonlTask(bad, "{q}", "{q}")
    bad.write_text('{"q": [1]}\n\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: .*'q'.* it has a"):
        jsonl.JsonlTask(bad, "{q[0]}", "")
    with pytest.raises(ValueError, match=r"line 1: the field 'q' of the template is a list, of wh"):
        jsonl.JsonlTask(bad, "{q}", "")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: .*index out of range.* it has q"):
        jsonl.JsonlTask(bad, "{q[1]}", "")
    bad.write_text('{"q": "abc"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: the template '{q:d}' does not fit"):
        jsonl.JsonlTask(bad, "{q:d}", "")
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: the field 'q' .* is text, not a li"):
        jsonl.JsonlTask(bad, "{q[0]}", "")
    bad.write_text('{"q": {"a": 1}}\n{"q": {"a": null}}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: the field 'q\[a\]' .* is null"):
        jsonl.JsonlTask(bad, "", "{q[a]}")
    bad.write_text('{"q": 1.5}\n{"q": NaN}\n{"q": 1e400}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: the field 'q' .* no number: nan"):
        jsonl.JsonlTask(bad, "{q}", "")
    bad.write_text('{"q": 1, "q": 2}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: not valid JSON .the key 'q' is th"):
        jsonl.JsonlTask(bad, "{q}", "")
    bad.write_bytes(b'{"q": 1}\n{"q": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not UTF-8"):
        jsonl.JsonlTask(bad, "{q}", "")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{q.count}",
            r"the template's field 'q.count' has a dot, .* entries of objects are {object",
        ),
        ("{q.__class__}", r"the template's field 'q.__class__' has a dot"),
        ("{q[0].real}", r"the template's field 'q\[0\].real' has a dot"),
        ("{a.b}", r"the template's field 'a.b' has a dot, .* with a dot in its name needs another"),
        ("{q", r"the template '{q' is broken: expected '}'"),
        ("{m[x.y]:9999999999999}", r"line 1: the template '{m\[x.y\]:9+}' does not fit"),
    ],
)
def test_templates_that_are_refused(tmp_path, template, message):
    path = write(tmp_path / "toy.jsonl", {"q": [1], "a.b": "x", "m": {"x.y": "z"}})
    with pytest.raises(ValueError, match=message):
        jsonl.JsonlTask(path, template, "")
    assert jsonl.JsonlTask(path, "{m[x.y]}", "")[0].prompt == "z"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"q": 1}\r\n{"q": 2}\r\n', encoding="utf-8-sig")
    assert [e.prompt for e in jsonl.JsonlTask(path, "{q}", "").examples] == ["1", "2"]


def test_where_an_example_is_from(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_text('{"q": 1}\r\n\n\n{"q": 2}')
    task = jsonl.JsonlTask(path, "{q}", "")
    assert [task.where(i) for i in range(2)] == [f"{path}, line 1", f"{path}, line 4"]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5\n#### 5", "5"),
        ("#### $1,234.", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("####-3", "-3"),
        ("#### -$3", "-3"),
        ("#### 18 dollars in 2 days", "18"),
        ("#### 7\n\nQuestion: and now?\n#### 9", "7"),  # the model went on
        ("so the answer is 42.", "42"),
        ("10-3", "3"),
        ("first 1, then 2, 3", "3"),
        ("it is .5", "0.5"),
        ("#### none, so 8", "8"),
        ("12 eggs ####", "12"),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    expected = None if number is None else decimal.Decimal(number)
    assert jsonl.final_number(text) == expected


def test_gsm8k(tmp_path):
    record = {"question": "How many?", "answer": "1000+200=<<1000+200=1200>>1200\n#### 1,200"}
    task = jsonl.gsm8k(write(tmp_path / "toy.jsonl", record))
    assert task[0].prompt == "Question: How many?\nAnswer:"
    assert task.score(task[0], task[0].completion) == {"score": 1.0}
    assert task.score(task[0], "It is $1200.00.") == {"score": 1.0}
    assert task.score(task[0], "1200\n#### 1201") == {"score": 0.0}
    assert task.score(task[0], "no idea") == {"score": 0.0}


def test_mbpp(tmp_path):
    tests = ["assert set(twice([1])) == {2}", "assert twice([]) == []", "assert not twice([])"]
    record = {"text": "Double it.", "code": "def twice(x):\r\n  return [2*v for v in x]"}
    task = jsonl.mbpp(write(tmp_path / "toy.jsonl", {**record, "test_list": tests}))
    example = task[0]
    assert "Double it." in example.prompt and all(test in example.prompt for test in tests)
    assert "\r" not in example.completion
    right = {"score": 1.0, "parses": 1.0}
    assert task.score(example, example.completion) == right
    assert task.score(example, "def twice(x): pass\n[DONE]\nnot Python at all") == right
    assert task.score(example, "Sure!\n```python\ndef twice(x): pass\n```\nBye.") == right
    assert task.score(example, "twice = lambda x: x") == right
    assert task.score(example, "class twice: pass") == right
    only_parses = {"score": 0.0, "parses": 1.0}
    assert task.score(example, "def thrice(x): pass") == only_parses
    assert task.score(example, "def f():\n  def twice(x): pass") == only_parses
    assert task.score(example, "") == only_parses
    broken = {"score": 0.0, "parses": 0.0}
    assert task.score(example, "def twice(x)\n  pass") == broken
    assert task.score(example, "def twice(x): pass\0") == broken


def test_mbpp_shows_the_second_to_fourth_of_solved_tasks(tmp_path):
    solved = [
        {"text": f"task {i}", "code": f"f = {{{i}}}", "test_list": [""] * 3} for i in range(6)
    ]
    shots = write(tmp_path / "shots.jsonl", *solved)
    plain = jsonl.mbpp(shots)
    (asked, *_) = jsonl.mbpp(shots, shots).examples
    shown = "".join(f"{e.prompt}{e.completion}\n\n" for e in plain.examples[1:4])
    assert asked.prompt == shown + plain.examples[0].prompt and "f = {2}\n[DONE]\n\nYou" in shown


def test_mbpp_wants_every_name_that_all_tests_call(tmp_path):
    tests = [
        "assert len(f(g(1))) == 1",
        "assert f(g(2), len(h())) == 2",
        "assert g(f(len([]))) == 3",
    ]
    record = {"text": "", "code": "", "test_list": tests}
    task = jsonl.mbpp(write(tmp_path / "toy.jsonl", record))
    assert task.score(task[0], "def f(x): pass\ndef g(x): pass")["score"] == 1.0
    assert task.score(task[0], "def f(x): pass")["score"] == 0.0


@pytest.mark.parametrize(
    ("load", "name", "length"),
    [
        (jsonl.gsm8k, "gsm8k/test_dev.jsonl", 660),
        (jsonl.mbpp, "mbpp/test_dev.jsonl", 250),
        (jsonl.mbpp, "mbpp/validation.jsonl", 90),
    ],
)
def test_published_answers_score_one(load, name, length):
    if not (DATA / name).is_file():
        pytest.skip("shared data is absent")
    task = load(DATA / name)
    assert len(task) == length
    for example in task.examples:
        assert task.score(example, example.completion)["score"] == 1.0
    # Another problem's answer is hardly ever right.
    pairs = zip(task.examples, task.examples[1:], strict=False)
    scores = [task.score(example, other.completion)["score"] for example, other in pairs]
    assert sum(scores) < 0.1 * length
