import itertools
import time

import pytest

from dlm import tasks
from dlm.tasks import sudoku
from tests.lib.paths import SHARED

DATA = SHARED / "data" / "sudoku"

SOLUTION = "1234\n3412\n4123\n2341"


def is_solved(grid: str) -> bool:
    """The rules, written out plainly."""
    rows = grid.split("\n")
    size = len(rows)
    box = {4: 2, 9: 3}[size]
    starts = range(0, size, box)
    boxes = [
        [rows[r + i][c + j] for i in range(box) for j in range(box)] for r in starts for c in starts
    ]
    digits = set("123456789"[:size])
    return all(
        len(unit) == size and set(unit) == digits
        for unit in itertools.chain(rows, zip(*rows, strict=True), boxes)
    )


def test_there_are_288_grids_of_4x4():
    grids = sudoku.solve("0" * 16, limit=1000)
    assert len(set(grids)) == len(grids) == 288
    assert all(map(is_solved, grids))


def test_solve_counts_solutions():
    assert sudoku.solve("1000\n0002\n4003\n0000") == [SOLUTION]
    assert len(sudoku.solve("1" + "0" * 15, limit=100)) == 288 / 4
    assert len(sudoku.solve("." * 81, limit=3)) == 3
    assert sudoku.solve("11" + "0" * 14) == []
    assert sudoku.solve("1230" + "0004" + "0" * 8) == []  # the fourth cell has no digit left
    assert sudoku.solve(SOLUTION) == [SOLUTION]
    assert sudoku.solve(SOLUTION[:-1] + "2") == []


def test_solve_agrees_with_trying_all_grids():
    grids = [grid.replace("\n", "") for grid in sudoku.solve("0" * 16, limit=288)]
    task = sudoku.Sudoku(num_clues=5)
    for index in range(20):
        clues = task[index].prompt.replace("\n", "")
        clues = clues[: index % 16] + "0" + clues[index % 16 + 1 :]  # often several solutions
        fits = [g for g in grids if all(c in ("0", d) for c, d in zip(clues, g, strict=True))]
        found = [grid.replace("\n", "") for grid in sudoku.solve(clues, limit=288)]
        assert sorted(found) == sorted(fits)


@pytest.mark.parametrize(
    ("grid", "message"),
    [("123", "grid has 3 cells"), ("5" + "0" * 15, "holds '5'"), ("x" + "0" * 80, "holds 'x'")],
)
def test_solve_rejects(grid, message):
    with pytest.raises(ValueError, match=message):
        sudoku.solve(grid)


def test_solves_published_17_clue_puzzles():
    if not DATA.is_dir():
        pytest.skip("shared data is absent")
    lines = (DATA / "sudoku_9x9_10k.txt").read_text().split()
    hard = [line for line in lines if sum(c != "." for c in line) == 17][:100]
    start = time.process_time()
    for line in hard:
        (solution,) = sudoku.solve(line)
        assert is_solved(solution)
        pairs = zip(line, solution.replace("\n", ""), strict=True)
        assert all(clue in (".", digit) for clue, digit in pairs)
    assert time.process_time() - start < 5.0  # about 0.3 s on one core


@pytest.mark.parametrize(
    ("size", "num_clues"), [(4, 4), (4, 8), (4, 12), (4, 15), (9, 26), (9, 36), (9, 80)]
)
def test_puzzles_are_proper(size, num_clues):
    for split in ("train", "test"):
        task = sudoku.Sudoku(size=size, num_clues=num_clues, split=split)
        for index in range(5):
            example = task[index]
            puzzle = example.prompt.rstrip("\n")
            assert sum(c in "123456789" for c in puzzle) == num_clues
            assert [len(row) for row in puzzle.split("\n")] == [size] * size
            assert sudoku.solve(puzzle) == [example.completion]
            assert is_solved(example.completion)


def test_9x9_generation_is_fast():
    task = sudoku.Sudoku(size=9, num_clues=30, split="test")
    start = time.process_time()
    for index in range(10):
        task[index]
    assert (time.process_time() - start) / 10 < 0.05


def test_every_4x4_grid_occurs_about_equally_often():
    task = sudoku.Sudoku(num_clues=14)
    counts: dict[str, int] = {}
    for index in range(2880):
        solution = task[index].completion
        counts[solution] = counts.get(solution, 0) + 1
    assert len(counts) > 280
    assert max(counts.values()) < 40  # 10 expected


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (SOLUTION, 1.0),
        ("Here it is:\n1 2 3 4\n3,4,1,2\n4, 1, 2, 3\n2341\nDone.", 1.0),
        ("1234\n3412\n4123\n2314", 0.0),
        ("3412\n1234\n4123\n2341", 0.0),  # rows in another order
        ("1234\n3412\n4123", 0.0),
        (SOLUTION + "\n1234", 0.0),
        (SOLUTION.replace("\n", ""), 0.0),
        ("", 0.0),
    ],
)
def test_score(answer, score):
    example = tasks.Example("1000\n0002\n4003\n0000\n", SOLUTION, {"operation": "4x4"})
    assert sudoku.Sudoku().score(example, answer) == {"score": score}


def test_published_files():
    if not DATA.is_dir():
        pytest.skip("shared data is absent")
    files = sorted(DATA.glob("sudoku_4x4_*.jsonl"))
    assert len(files) == 8
    for file in files:
        task = sudoku.load_sudoku(file)
        assert len(task) == 54
        for index in range(54):
            example = task[index]
            assert sudoku.solve(example.prompt) == [example.completion]
            assert task.score(example, example.completion) == {"score": 1.0}
            assert task.score(example, example.prompt) == {"score": 0.0}
