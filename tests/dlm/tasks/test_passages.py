"""Paragraphs and how they go on."""

import pytest

from dlm.tasks.passages import Passages

TEXT = " \n = A Heading = and more \n \n one two three four five \n short \n a b c d e f g \n"


def test_long_paragraphs_are_cut_in_two(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    task = Passages(path, prompt_words=3, min_words=2)
    assert [(e.prompt, e.completion) for e in task.loaded] == [
        ("one two three", " four five"), ("a b c", " d e f g")
    ]  # fmt: skip
    assert len(task) == 2 and task[1].metadata["operation"] == "text"
    assert task.score(task[0], "four five") == {"score": 1.0}
    with pytest.raises(ValueError, match=r"no paragraph of prompt_words \+ min_words = 64 words"):
        Passages(path)
    with pytest.raises(ValueError, match="min_words=0 must be at least 1"):
        Passages(path, min_words=0)
    with pytest.raises(FileNotFoundError, match="is not a file; give a text file"):
        Passages(tmp_path / "nowhere.txt")
