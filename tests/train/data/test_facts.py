"""What is noted of a task's examples: it changes where they do, and nowhere else."""

import dataclasses

import numpy as np
import pytest

from dlm.tasks import Encoded, Example
from dlm.tasks.jsonl import JsonlTask
from tests.lib import toys
from train import data
from train.config import ConfigError
from train.data import facts


def test_a_file_that_changed(tmp_path):
    def of(text, name="some.jsonl", prompt="{q}"):
        (tmp_path / name).write_text(text)
        return data.describe(JsonlTask(tmp_path / name, prompt, "{a}"))

    lines = ['{"q": "a", "a": "b", "id": 1}', '{"q": "c", "a": "d", "id": 2}'] * 300
    first = of("\n".join(lines))
    assert first["num_examples"] == 600
    assert of("\n".join(lines), "moved.jsonl") == first  # its name and its time do not matter
    assert of("\n\n".join(lines).replace('"id": 1', '"id": 3')) == first  # nor what nobody reads
    changed = lines.copy()
    changed[417] = '{"q": "a", "a": "e"}'
    assert of("\n".join(changed)) != first
    assert of("\n".join(lines[::-1])) != first
    assert of("\n".join(lines[:-1]))["num_examples"] == 599
    assert of("\n".join(lines), prompt="{q}?") != first
    assert of('{"q": "ab", "a": "c"}') != of('{"q": "a", "a": "bc"}')


def test_examples_that_are_made_when_they_are_needed(monkeypatch):
    task = toys.Lines(num_examples=1000)
    seen = []
    monkeypatch.setattr(
        toys.Lines,
        "__getitem__",
        lambda self, i: seen.append(i) or Example("", f"{i % self.num_examples}", {}),
    )
    first = data.describe(task)
    assert len(seen) == facts.NUM_SEEN and (seen[0], seen[-1]) == (0, 999)
    assert data.describe(toys.Lines(num_examples=1000)) == first
    assert data.describe(toys.Lines(num_examples=1001)) != first


def test_token_ids(monkeypatch):
    example = Encoded(np.arange(3, dtype=np.int32), np.ones(2, np.int32), np.zeros(2, np.int32))
    task = toys.Lines(num_examples=2)
    monkeypatch.setattr(toys.Lines, "__getitem__", lambda self, i: example)
    first = data.describe(task)
    example = dataclasses.replace(example, step_map=np.array([0, 1], np.int32))
    assert data.describe(task) != first


def test_a_bad_record_is_one_sentence(monkeypatch):
    def bad(self, index):
        raise ValueError(f"lines.txt, line {index + 1}: no letters")

    monkeypatch.setattr(toys.Lines, "__getitem__", bad)
    with pytest.raises(ConfigError, match=r"^lines\.txt, line 1: no letters$"):
        data.describe(toys.Lines())
