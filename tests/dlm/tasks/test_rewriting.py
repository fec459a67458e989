"""Sentences and programs to be edited: prompts, scores, and right answers."""

import ast

import pytest

from dlm.tasks import code_edits, corrupted, rewriting
from tests.lib.paths import SHARED

DATA = SHARED / "data"
has_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not here")


def files(folder, **lines):
    for name, texts in lines.items():
        (folder / name.replace("_", ".")).write_text("\n".join(texts) + "\n")
    return folder


def test_prompts_hold_the_source_between_marks(tmp_path):
    sources, right = ["He go home . ", "A b ."], ["He goes home . ", "A b ."]
    other = ["He went home .", "a B ."]
    refs = dict(dev_ref0=right, dev_ref1=other, dev_ref2=right, dev_ref3=right)
    task = rewriting.jfleg(files(tmp_path, dev_src=sources, **refs))
    assert len(task) == 2 and task.where(1).endswith("dev.src, line 2")
    assert task[0].prompt.endswith(":\nHe go home .\nOutput:\n")
    _, _, behind = task[0].prompt.partition(rewriting.OPENING)
    assert behind.rpartition(rewriting.CLOSING)[0] == "He go home ."
    assert task[0].completion == "He goes home ."
    assert task.score(task[0], "He went  home .\nmore") == {
        "score": 1.0, "exact": 1.0, "copied": 0.75
    }  # fmt: skip
    assert task.score(task[0], "He go .") == {"score": 0.5, "exact": 0.0, "copied": 0.75}
    assert task.score(task[0], "")["score"] == 0
    (tmp_path / "dev.ref1").write_text("one\n")
    with pytest.raises(ValueError, match=r"dev\.ref1 has 1 lines and .*dev\.src 2"):
        rewriting.jfleg(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        rewriting.jfleg(tmp_path, "test")
    with pytest.raises(ValueError, match=r"references=\(\) must have"):
        rewriting.asset(files(tmp_path, valid_orig=sources))


def test_words_are_compared():
    for a, b, expected in (("a b c", "a c", 2 / 3), ("", "", 1), ("a", "", 0), ("a b", "b a", 0)):
        assert rewriting.similarity(a, b) == rewriting.similarity(b, a) == pytest.approx(expected)


PROGRAM = 'def add(first, second=1):\n    # first of all\n    return first + max(second, "first")\n'


def function(source):
    return ast.parse(source).body[-1]


def test_edits_change_what_they_say_and_nothing_else():
    instruction, edited = code_edits.rename(PROGRAM, function(PROGRAM), "")
    assert "Rename the variable first to values" in instruction
    assert edited == (
        'def add(values, second=1):\n    # first of all\n    return values + max(second, "first")\n'
    )
    instruction, edited = code_edits.add_docstring(PROGRAM, function(PROGRAM), "Adds.")
    assert 'the docstring """Adds."""' in instruction and instruction.endswith("function add.")
    assert edited == PROGRAM.replace("    return", '    """Adds."""\n    return')
    _, edited = code_edits.add_hints(PROGRAM, function(PROGRAM), "")
    assert edited == PROGRAM.replace("(first, second=1)", "(first: object, second: object=1)")


def test_edits_that_would_change_more_are_not_made():
    keyword = "def f(key):\n    return sorted(key, key=len)\n"
    attribute = "def f(x, y):\n    return x.y + y.x\n"
    no_names = "def f(a):\n    values = number = item = other = data = result = a\n"
    for source in (keyword, attribute, no_names):
        assert code_edits.rename(source, function(source), "") is None
    named = "def f(x):\n    return f'{x} is ' + str(x)\n"
    assert code_edits.rename(named, function(named), "") is None
    one_line, documented = "def f(a): return a\n", 'def f(a):\n    "Done."\n    return a\n'
    for source in (one_line, documented):
        assert code_edits.add_docstring(source, function(source), "Text.") is None
    assert code_edits.add_docstring(PROGRAM, function(PROGRAM), 'A "b".') is None
    typed = "def f(a: int):\n    return a\n"
    assert code_edits.add_hints(typed, function(typed), "") is None


def test_every_program_that_allows_one_gets_an_edit(tmp_path):
    file = tmp_path / "programs.jsonl"
    records = [r"x = 1", r"def f(a):\r\n\treturn a", r"def (", r"def g(b):\n  return 'é'"]
    records += [r"def h(c):\n  return c", r"def k():\n  return 0"]
    lines = ['{"text": "Do  it.", "code": "' + code + '"}\n' for code in records]
    file.write_text("".join(lines))
    task = code_edits.CodeEdits(file)
    assert [task.where(i)[-6:] for i in range(len(task))] == ["line 2", "line 5", "line 6"]
    assert [e.metadata["operation"] for e in task.loaded] == ["rename", "docstring", "docstring"]
    assert task[0].completion == "def f(values):\n\treturn values"
    assert task[1].completion == 'def h(c):\n  """Do it."""\n  return c'
    answer = f"```python\n{task[1].completion}\n```"
    assert task.score(task[1], answer)["score"] == 1 and task.score(task[1], "pass")["score"] == 0
    file.write_text('{"text": "", "code": "x = 1"}\n')
    with pytest.raises(ValueError, match="no program that can be edited"):
        code_edits.CodeEdits(file)


TEXT = " ".join(
    f"The {a} man looked at the {b} house, and went to {c}."
    for a in ("old", "young", "tall", "small") for b in ("white", "dark") for c in ("town", "bed")
)  # fmt: skip


def test_mistakes_follow_from_the_number_of_the_example(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT + " Mr. Short. what is this of here.")
    make = lambda split="train", **more: corrupted.Corrupted(
        path=tmp_path, split=split, num_examples=200, **more
    )
    task, examples = make(), [make()[i] for i in range(200)]
    assert [task[i] for i in (7, 3)] == [examples[7], examples[3]]
    assert make(seed=1)[0] != examples[0]
    kept = {example.completion for example in examples}
    held_out = {make("test")[i].completion for i in range(50)}
    assert kept and held_out and not kept & held_out and len(kept | held_out) == 16
    assert all(s.endswith(" .") and " , and" in s for s in kept)
    sources = [example.metadata["source"] for example in examples]
    same = sum(e.metadata["source"] == e.completion for e in examples) / 200
    assert 0.15 < same < 0.45 and len(set(sources)) > 100
    close = [task.score(e, e.metadata["source"])["score"] for e in examples]
    assert min(close) > 0.4 and task.score(examples[0], examples[0].completion)["exact"] == 1
    assert all(e.prompt == rewriting.write_prompt(rewriting.CORRECT, s)
               for e, s in zip(examples, sources, strict=True))  # fmt: skip


def test_texts_without_sentences_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a text nor a folder with \*\.txt"):
        corrupted.Corrupted(path=tmp_path)
    (tmp_path / "a.txt").write_text("No. Never.")
    with pytest.raises(ValueError, match="must have sentences of at most 160 characters"):
        corrupted.Corrupted(path=tmp_path)
    with pytest.raises(ValueError, match="max_mistakes=0 must be at least 1"):
        corrupted.Corrupted(path=tmp_path, max_mistakes=0)


@has_data
def test_published_files():
    """As many as their READMEs say; most of each answer is a copy, and every program parses."""
    jfleg, asset = rewriting.jfleg(DATA / "jfleg"), rewriting.asset(DATA / "asset")
    assert (len(jfleg), len(asset)) == (754, 2000)
    assert (len(jfleg.references), len(asset.references)) == (4, 3)
    edits = code_edits.CodeEdits(DATA / "mbpp" / "validation.jsonl")
    for task, least in ((jfleg, 0.6), (asset, 0.5), (edits, 0.6)):
        scores = [task.score(task[i], task[i].completion) for i in range(50)]
        assert sum(score["copied"] for score in scores) / 50 > least
        assert all(score["score"] == 1 for score in scores)
    for example in edits.loaded:
        assert example.completion != example.metadata["source"] and ast.parse(example.completion)
    kinds = {example.metadata["operation"] for example in edits.loaded}
    assert len(edits) > 70 and kinds == {*code_edits.EDITS}
