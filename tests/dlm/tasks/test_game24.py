"""Puzzles and all their answers, by brute force; what is kept apart from what is trained on."""

import doctest
import itertools

import pytest

from dlm.tasks import game24
from dlm.tasks.countdown import is_solution
from dlm.tasks.game24 import Game24, PublishedGame24, solutions, split_of
from tests.lib.paths import SHARED

FILE = SHARED / "data" / "game24" / "24_dev.csv"
CSV = "Rank,Puzzles,Rate\n1,1 1 4 6,99%\n2,3 3 8 8,9%\n3,1 2 3 4,90%\n4,13 13 12 12,80%\n"


def test_every_chain_is_right_and_none_is_missing():
    for numbers in ((1, 2, 3, 4), (1, 2, 11, 12), (4, 4, 10, 10)):
        found = solutions(numbers)
        assert len(set(found)) == len(found)
        assert all(is_solution(list(numbers), 24, text) for text in found)
    # (10 * 10 - 4) / 4 is the only way; 8 / (3 - 8 / 3) has fractions on it.
    assert set(solutions((4, 4, 10, 10))) == {"10*10=100,100-4=96,96/4=24"}
    assert not solutions((1, 1, 1, 1)) and not solutions((3, 3, 8, 8))
    # Three numbers, by all pairs of equations there are.
    every = [
        f"{a}{x}{b}={c},{d}{y}{e}=24"
        for a, b in itertools.permutations((2, 3, 4), 2)
        for x in "+-*/" for c in range(13) for y in "+-*/"
        for d, e in itertools.permutations((c, ({2, 3, 4} - {a, b}).pop()))
    ]  # fmt: skip
    right = {text for text in every if is_solution([2, 3, 4], 24, text)}
    same = lambda text: tuple(
        (*sorted(part.split("=")[0].split(sign)), sign)
        for part in text.split(",") for sign in "+-*/" if sign in part
    )  # fmt: skip
    assert {same(text) for text in right} == {same(text) for text in solutions((2, 3, 4))}
    assert len(right) > len(solutions((2, 3, 4))) == 3  # the order of factors does not matter


def test_all_puzzles():
    every = itertools.combinations_with_replacement(range(1, 14), 4)
    solvable = [numbers for numbers in every if solutions(numbers)]
    assert len(solvable) == 1346
    assert 0.17 < sum(split_of(numbers) == "test" for numbers in solvable) / 1346 < 0.23


def test_published_puzzles(tmp_path):
    path = tmp_path / "24.csv"
    path.write_text(CSV)
    task = PublishedGame24(path)
    assert [example.prompt for example in task.loaded] == [
        "1,1,4,6\n", "1,2,3,4\n", "13,13,12,12\n"
    ]  # fmt: skip
    assert task.score(task[1], task[1].completion) == {"score": 1.0}
    assert task.score(task[1], "4*3=12,12*2=24,24/1=24") == {"score": 1.0}
    assert task.score(task[1], "4*3=12,12*2=24") == {"score": 0.0}
    rest = PublishedGame24(path, held_out=True)
    assert all(split_of(list(map(int, e.prompt.split(",")))) == "test" for e in rest.loaded)
    assert len(rest) < len(task)
    with pytest.raises(FileNotFoundError, match="is not a file; give a CSV file"):
        PublishedGame24(tmp_path / "nowhere.csv")
    path.write_text("Puzzles\n1 1 4 six\n")
    with pytest.raises(ValueError, match="has no numbers in Puzzles"):
        PublishedGame24(path)
    path.write_text("Puzzles\n1 1 1 1\n")
    with pytest.raises(ValueError, match="has no puzzle that can be asked"):
        PublishedGame24(path)


def test_the_order_of_numbers_does_not_change_the_split():
    task = Game24(num_examples=40)
    assert {split_of(list(map(int, task[i].prompt.split(",")))) for i in range(40)} == {"train"}
    assert split_of([4, 3, 2, 1]) == split_of([1, 2, 3, 4])


def test_docstring_examples():
    result = doctest.testmod(game24)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.skipif(not FILE.is_file(), reason="the published file is not there")
def test_published_file():
    assert len(PublishedGame24(FILE)) == 674
    assert 100 < len(PublishedGame24(FILE, held_out=True)) < 200
