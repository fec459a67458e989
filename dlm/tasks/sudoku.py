"""Sudoku of 4x4 and 9x9: an exact solver, a generator of puzzles with one solution, a scorer.

A grid is text: one line of digits per row, 0 for an empty cell. The solver keeps one bit set of
cells per digit, "where may this digit still go?", so that a rule is applied to all cells of the
grid with a handful of integer operations.
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from dlm import tasks
from dlm.tasks import jsonl, splits

# Fewest clues the generator promises. No 4x4 grid is determined by 3; 9x9 grids exist for 17, but
# removing clues at random gets below 24 too seldom.
_MIN_CLUES = {4: 4, 9: 24}

# Puzzles in the wrong split get new digits this many times before a fresh one is drawn.
_RELABELLINGS = 24


@functools.cache
def _geometry(size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bit sets of cells: the 3 * size units, and for each cell all cells that share a unit."""
    box = math.isqrt(size)
    members = [[size * r + c for c in range(size)] for r in range(size)]
    members += [[size * r + c for r in range(size)] for c in range(size)]
    members += [
        [size * (top + r) + left + c for r in range(box) for c in range(box)]
        for top in range(0, size, box)
        for left in range(0, size, box)
    ]
    units = tuple(sum(1 << cell for cell in unit) for unit in members)
    peers = []
    for cell in range(size * size):
        shared = 0
        for unit in units:
            shared |= unit if unit >> cell & 1 else 0
        peers.append(shared & ~(1 << cell))
    return units, tuple(peers)


def _propagate(candidates: list[int], settled: int, size: int) -> int | None:
    """Fills in every forced cell, in place.

    Args:
        candidates: per digit, the bit set of cells where it may go. Changed.
        settled: bit set of cells whose only digit is already barred from their peers.
        size: 4 or 9.

    Returns:
        The settled cells, or None where the grid has no solution.
    """
    units, peers = _geometry(size)
    every_cell = (1 << size * size) - 1
    while True:
        once = twice = 0
        for cells in candidates:
            twice |= once & cells
            once |= cells
        if once != every_cell:
            return None  # a cell without any digit
        if fresh := once & ~twice & ~settled:
            for digit in range(size):
                single = candidates[digit] & fresh
                while single:
                    lowest = single & -single
                    candidates[digit] &= ~peers[lowest.bit_length() - 1]
                    single ^= lowest
            settled |= fresh
            continue
        has_changed = False
        for digit in range(size):
            cells = candidates[digit]
            for unit in units:
                places = cells & unit
                if not places:
                    return None  # a unit without this digit
                if places & (places - 1) == 0 and not places & settled:
                    for other in range(size):
                        if other != digit:
                            candidates[other] &= ~places
                    has_changed = True
        if not has_changed:
            return settled


def _branch_cell(candidates: Sequence[int], settled: int, size: int) -> int:
    """The lowest open cell with two digits, else with three, else any."""
    once = twice = thrice = more = 0
    for cells in candidates:
        more |= thrice & cells
        thrice |= twice & cells
        twice |= once & cells
        once |= cells
    open_cells = ((1 << size * size) - 1) & ~settled
    chosen = (open_cells & ~thrice) or (open_cells & ~more) or open_cells
    return (chosen & -chosen).bit_length() - 1


def _search(
    candidates: list[int], settled: int, size: int, rng: np.random.Generator | None
) -> Iterator[list[int]]:
    """Yields the candidates of every solution; `rng` shuffles the order of the digits tried."""
    now_settled = _propagate(candidates, settled, size)
    if now_settled is None:
        return
    if now_settled == (1 << size * size) - 1:
        yield candidates
        return
    cell = _branch_cell(candidates, now_settled, size)
    digits = [digit for digit in range(size) if candidates[digit] >> cell & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        branch = [cells & ~(1 << cell) for cells in candidates]
        branch[digit] |= 1 << cell
        yield from _search(branch, now_settled, size, rng)


def _candidates(cells: Sequence[int], size: int) -> list[int]:
    """Per digit, the cells that hold it or are empty; `cells` are digits in row order."""
    empty = sum(1 << i for i, value in enumerate(cells) if value == 0)
    return [
        empty | sum(1 << i for i, value in enumerate(cells) if value == digit)
        for digit in range(1, size + 1)
    ]


def _cells(candidates: Sequence[int], size: int) -> list[int]:
    """Digits in row order of a solved grid."""
    return [
        next(digit + 1 for digit in range(size) if candidates[digit] >> cell & 1)
        for cell in range(size * size)
    ]


def _render(cells: Sequence[int], size: int) -> str:
    rows = ("".join(map(str, cells[i : i + size])) for i in range(0, size * size, size))
    return "\n".join(rows)


def _has_one_solution(cells: Sequence[int], size: int) -> bool:
    solutions = _search(_candidates(cells, size), 0, size, None)
    return next(solutions, None) is not None and next(solutions, None) is None


def solve(grid: str, limit: int = 2) -> list[str]:
    """Up to `limit` solutions of a grid; none, one or several tells whether a puzzle is proper.

    Example:
        >>> solve("1000\\n0002\\n4003\\n0000")
        ['1234\\n3412\\n4123\\n2341']

    Args:
        grid: 16 or 81 digits in row order; "0" or "." is empty, white space is ignored.
        limit: at least 1.

    Returns:
        Solved grids, one line per row.

    Raises:
        ValueError: the grid has another number of cells or another character in it.
    """
    text = "".join(grid.split()).replace(".", "0")
    size = math.isqrt(len(text))
    if len(text) not in (16, 81):
        raise ValueError(f"grid has {len(text)} cells; it must have 16 (4x4) or 81 (9x9)")
    if wrong := sorted(set(text) - set("0123456789"[: size + 1])):
        raise ValueError(f"grid holds {wrong[0]!r}; cells must be digits 0 to {size} or '.'")
    cells = [int(character) for character in text]
    solutions = _search(_candidates(cells, size), 0, size, None)
    found = itertools.islice(solutions, limit)
    return [_render(_cells(candidates, size), size) for candidates in found]


def score_grid(example: tasks.Example, completion: str) -> dict[str, float]:
    """1.0 where the rows in `completion` are those of the solution.

    Spaces and commas are dropped; then lines of exactly `size` digits count as rows and all other
    lines are ignored.
    """
    solution = example.completion.split()
    lines = completion.replace(" ", "").replace(",", "").splitlines()
    digits = set("0123456789")
    rows = [line for line in lines if len(line) == len(solution) and set(line) <= digits]
    return {"score": float(rows == solution)}


def load_sudoku(path: str | os.PathLike[str]) -> jsonl.JsonlTask:
    """Puzzles from a JSON-lines file with grids `input` and `output`, scored by `score_grid`."""
    return jsonl.JsonlTask(path, "{input}\n", "{output}", score_grid)


@dataclasses.dataclass(frozen=True)
class Sudoku(splits.Stream):
    """Random puzzles with exactly one solution.

    Clues are taken from a random solved grid, in random order, as long as the solution stays the
    only one. Every solved grid and every order can occur; grids are not exactly uniform. The split
    is decided by the puzzle, so no test puzzle is ever in the training stream; 4x4 *solutions* do
    repeat, for there are only 288.

    Attributes:
        size: 4 or 9.
        num_clues: filled cells in the prompt; 4 to 15 for size 4, 24 to 80 for size 9, where
            an example takes about 10 ms with 30 clues and 40 ms with 24.
    """

    size: int = 4
    num_clues: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size not in _MIN_CLUES:
            raise ValueError(f"size={self.size} must be 4 or 9")
        low, high = _MIN_CLUES[self.size], self.size**2 - 1
        if not low <= self.num_clues <= high:
            raise ValueError(
                f"num_clues={self.num_clues} must be in [{low}, {high}] for size={self.size}"
            )

    def __getitem__(self, index: int) -> tasks.Example:
        rng = self._rng(index)
        puzzle, solution = self._draw_in_split(rng)
        return tasks.Example(
            prompt=puzzle + "\n",
            completion=solution,
            metadata={
                "operation": f"{self.size}x{self.size}, {self.num_clues} clues",
                "num_clues": self.num_clues,
            },
        )

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for the solved grid; see `score_grid`."""
        return score_grid(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        """The digits and the line end."""
        return ("\n", *"0123456789"[: self.size + 1])

    def _draw_in_split(self, rng: np.random.Generator) -> tuple[str, str]:
        """A puzzle of the wanted split and its solution, both as text."""
        for attempt in range(splits.MAX_DRAWS):
            if attempt % _RELABELLINGS == 0:
                puzzle, solution = self._draw(rng)
            digits = [0, *(rng.permutation(self.size) + 1).tolist()]
            text = _render([digits[value] for value in puzzle], self.size)
            if splits.split_of(text) == self.split:
                return text, _render([digits[value] for value in solution], self.size)
        raise ValueError(f"no {self.split} puzzle in {splits.MAX_DRAWS} draws for {self}")

    def _draw(self, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Cells of a puzzle with `num_clues` clues and one solution, and of the solution."""
        size = self.size
        for _ in range(splits.MAX_DRAWS):
            empty = _candidates([0] * size**2, size)
            solution = _cells(next(_search(empty, 0, size, rng)), size)
            puzzle, num_clues = list(solution), size**2
            for cell in rng.permutation(size**2).tolist():
                puzzle[cell] = 0
                if _has_one_solution(puzzle, size):
                    num_clues -= 1
                    if num_clues == self.num_clues:
                        return puzzle, solution
                else:
                    puzzle[cell] = solution[cell]
        raise ValueError(f"no puzzle with {self.num_clues} clues in {splits.MAX_DRAWS} draws")
