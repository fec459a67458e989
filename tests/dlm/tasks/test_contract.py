"""What every generated task promises, and what importing the package costs."""

import dataclasses
import doctest
import pickle
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dlm import tasks
from dlm.tasks import countdown, game24, scan, splits, sudoku, waiting_line, word_problems
from tests.lib.paths import ROOT

GENERATED: dict[str, Any] = {
    "scan simple": scan.Scan(),
    "scan length": scan.Scan(partition="length"),
    "waiting line, no shots": waiting_line.WaitingLine(num_shots=0),
    "waiting line, 2 shots": waiting_line.WaitingLine(num_shots=2, max_people=15),
    "waiting line, few names": waiting_line.WaitingLine(
        min_people=2, max_people=4, num_first_names=4, num_last_names=4
    ),
    "sudoku 4x4": sudoku.Sudoku(),
    "sudoku 9x9": sudoku.Sudoku(size=9, num_clues=45),
    "countdown": countdown.Countdown(),
    "game of 24": game24.Game24(),
    "word problems": word_problems.WordProblems(),
    "word problems, one step": word_problems.WordProblems(min_steps=1, max_steps=6, max_change=98),
}
every_task = pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED.keys())


def split_greedily(text: str, pieces: tuple[str, ...]) -> list[str]:
    """Longest match first; fails where no piece fits."""
    longest_first = sorted(pieces, key=len, reverse=True)
    parts, start = [], 0
    while start < len(text):
        part = next((piece for piece in longest_first if text.startswith(piece, start)), None)
        assert part is not None, f"no piece at {text[start : start + 30]!r} in {text!r}"
        parts.append(part)
        start += len(part)
    return parts


def test_waiting_line_sequences_are_short():
    task = waiting_line.WaitingLine(num_shots=0)
    pieces = task.pieces
    assert len(pieces) < 128
    examples = [task[index] for index in range(300)]
    examples.append(task.ask("replace_index", ["Alice Adams", "Zoe Garcia"], 1, "Rosa Young"))
    prompts = [len(split_greedily(example.prompt, pieces)) for example in examples]
    answers = [len(split_greedily(example.completion, pieces)) for example in examples]
    assert max(prompts) <= 32 and max(answers) <= 23
    assert statistics.median(prompts) <= 24 and statistics.median(answers) <= 16


def some_indices(task: Any, count: int) -> list[int]:
    rng = np.random.default_rng(0)
    return rng.choice(len(task), count, replace=False).tolist()


@every_task
def test_texts_split_into_pieces_and_gold_scores_one(task):
    count = 40 if getattr(task, "size", 4) == 9 else 200
    pieces = task.pieces
    assert len(set(pieces)) == len(pieces) and all(pieces)
    for index in some_indices(task, count):
        example = task[index]
        for text in (example.prompt, example.completion):
            assert "".join(split_greedily(text, pieces)) == text
        assert set(task.score(example, example.completion).values()) == {1.0}
        assert task.score(example, "")["score"] == 0.0
        assert isinstance(example.metadata["operation"], str)


@every_task
def test_items_depend_on_fields_and_index_only(task):
    indices = some_indices(task, 10)
    again = pickle.loads(pickle.dumps(dataclasses.replace(task)))
    assert hash(again) == hash(task) and again == task
    first = [task[index] for index in indices]
    assert [again[index] for index in reversed(indices)] == first[::-1]
    assert task[np.int64(indices[0])] == first[0]
    if hasattr(task, "seed"):
        other = dataclasses.replace(task, seed=task.seed + 1)
        assert [other[index] for index in indices] != first
        assert len({example.prompt for example in first}) == len(first)


@every_task
def test_index_out_of_range(task):
    for index in (-1, len(task)):
        with pytest.raises(IndexError, match=f"index={index} must be in"):
            task[index]
    with pytest.raises(TypeError):
        task["0"]


def instance_key(example: tasks.Example) -> str:
    """What makes two examples the same instance, written independently of the generators."""
    if "people" in example.metadata:
        return " ".join(sorted(example.metadata["people"]))
    if "####" in example.completion:  # the sums, whatever the words
        return example.completion
    if example.metadata["operation"] == "game of 24":
        return ",".join(sorted(example.prompt.strip().split(",")))
    if "," in example.prompt:
        *numbers, target = example.prompt.strip().split(",")
        return ",".join([*sorted(numbers), target])
    return example.prompt


@pytest.mark.exhaustive(every=4)
@every_task
def test_train_and_test_are_disjoint(task):
    count = 40 if getattr(task, "size", 4) == 9 else 400
    train = dataclasses.replace(task, split="train")
    test = dataclasses.replace(task, split="test")
    train_keys = {instance_key(train[index]) for index in some_indices(train, count)}
    test_keys = {instance_key(test[index]) for index in some_indices(test, count)}
    assert train_keys and test_keys and not train_keys & test_keys


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("task", "num_draws"),
    [
        (countdown.Countdown(num_numbers=2, max_number=10, min_target=1), 1500),
        (sudoku.Sudoku(num_clues=15), 1500),
        (game24.Game24(), 3000),
        (waiting_line.WaitingLine((*waiting_line.OPERATIONS,), 2, 2, 4, 4, 0), 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_small_spaces_stay_disjoint_when_drawn_dry(task, num_draws):
    keys = {}
    for split in ("train", "test"):
        stream = dataclasses.replace(task, split=split)
        keys[split] = {instance_key(stream[index]) for index in range(num_draws)}
        assert 5 < len(keys[split]) < 0.9 * num_draws  # many draws are repeats
    assert not keys["train"] & keys["test"]


def test_split_of_is_stable_and_a_fifth():
    # Known values: a change of the hash would let old test items into new training streams.
    known = {"jump": "train", "walk twice": "test", "1234": "train", "a b": "test"}
    assert {text: splits.split_of(text) for text in known} == known
    share = sum(splits.split_of(str(i)) == "test" for i in range(5000)) / 5000
    assert abs(share - 0.2) < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scan.Scan(split="dev"), "split='dev' must be 'train' or 'test'"),
        (lambda: scan.Scan(partition="jump"), "partition='jump' must be 'simple' or 'length'"),
        (lambda: sudoku.Sudoku(size=6), "size=6 must be 4 or 9"),
        (lambda: sudoku.Sudoku(num_clues=3), r"num_clues=3 must be in \[4, 15\]"),
        (lambda: sudoku.Sudoku(size=9, num_clues=17), r"num_clues=17 must be in \[24, 80\]"),
        (lambda: sudoku.Sudoku(seed=-1), "seed=-1 must be at least 0"),
        (lambda: word_problems.WordProblems(min_steps=4), "min_steps=4 and max_steps=3 must be"),
        (lambda: word_problems.WordProblems(max_change=1), r"max_change=1 must be in \[2, 98\]"),
        (lambda: countdown.Countdown(num_examples=0), "num_examples=0 must be at least 1"),
        (lambda: countdown.Countdown(num_numbers=1), r"num_numbers=1 must be in \[2, 6\]"),
        (lambda: countdown.Countdown(max_number=9), r"max_number=9 must be in \[10, 999\]"),
        (lambda: countdown.Countdown(max_target=5), r"min_target=10 must be in \[1, max_target=5"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("module", [scan, sudoku, waiting_line], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_tasks_feed_grain():
    grain = pytest.importorskip("grain")
    task = scan.Scan()
    data = grain.MapDataset.source(task).seed(0).shuffle().map(lambda example: example.prompt)
    assert len(data) == len(task)
    assert {data[i] for i in range(5)} <= {task[i].prompt for i in range(len(task))}


def test_imports_need_only_numpy():
    # An empty stand-in for `dlm` itself, for what that package imports is its own affair.
    code = (
        "import sys, types\n"
        "sys.modules['dlm'] = types.ModuleType('dlm')\n"
        "sys.modules['dlm'].__path__ = ['dlm']\n"
        "import dlm.tasks.countdown, dlm.tasks.jsonl, dlm.tasks.scan, dlm.tasks.sudoku\n"
        "import dlm.tasks.tfds_source, dlm.tasks.waiting_line\n"
        "heavy = {'jax', 'yaml', 'grain', 'tensorflow', 'tensorflow_datasets'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
