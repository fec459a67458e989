"""Game of 24: make 24 of four numbers, each used once.

    1,2,3,4
    1*2=2,2*3=6,6*4=24

Prompts are numbers from 1 to 13; answers are chains of equations, and are scored, as those of
`dlm.tasks.countdown`: every result is a whole number, so that the 16 of 1,362 published puzzles
that need fractions have no answer here.

Reference for the published puzzles: Yao et al., "Tree of Thoughts: Deliberate Problem Solving with
Large Language Models", arXiv:2305.10601, Sec. 4.1.
"""

import csv
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Sequence

from dlm import tasks
from dlm.tasks import splits
from dlm.tasks.countdown import Countdown, is_solution
from dlm.tasks.loaded import Loaded

TARGET = 24
NUM_NUMBERS, MAX_NUMBER = 4, 13


@functools.cache
def solutions(numbers: tuple[int, ...]) -> tuple[str, ...]:
    """All right chains of equations for some numbers, in a fixed order; () if there are none.

    Of a sum or a product only that order is there in which its numbers are at hand; results are
    behind what was there before.

    Example:
      >>> solutions((1, 1, 11, 12))[:2]
      ('1*1=1,11+12=23,1+23=24', '1*1=1,11+1=12,12+12=24')
    """
    if len(numbers) == 1:
        return ("",) if numbers[0] == TARGET else ()
    found: dict[str, None] = {}
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for equation, result in _equations(numbers[i], numbers[j], i < j):
            for behind in solutions((*rest, result)):
                found[f"{equation},{behind}" if behind else equation] = None
    return tuple(found)


def _equations(left: int, right: int, in_order: bool) -> list[tuple[str, int]]:
    """What can be made of two numbers, and the results."""
    every = []
    if in_order:
        every += [("+", left + right), ("*", left * right)]
    if left >= right:
        every.append(("-", left - right))
    if right and left % right == 0:
        every.append(("/", left // right))
    return [(f"{left}{symbol}{right}={result}", result) for symbol, result in every]


def split_of(numbers: Sequence[int]) -> str:
    """The split of a puzzle, whatever the order of its numbers."""
    return splits.split_of(",".join(map(str, sorted(numbers))))


def score_equations(example: tasks.Example, completion: str) -> dict[str, float]:
    """1.0 for any right chain of equations that makes 24 of the numbers in the prompt."""
    numbers = list(map(int, example.prompt.split(",")))
    return {"score": float(is_solution(numbers, TARGET, completion))}


def _example(numbers: Sequence[int], completion: str) -> tasks.Example:
    prompt = ",".join(map(str, numbers)) + "\n"
    return tasks.Example(prompt, completion, {"operation": "game of 24"})


@dataclasses.dataclass(frozen=True)
class Game24(splits.Stream):
    """Random puzzles, each with one of its answers; the numbers are in any order.

    There are 1,346 puzzles with an answer, about a fifth of which are of the test split. None of
    those is ever in the training stream, in whatever order.
    """

    def __getitem__(self, index: int) -> tasks.Example:
        rng = self._rng(index)
        for _ in range(splits.MAX_DRAWS):
            numbers = rng.integers(1, MAX_NUMBER + 1, NUM_NUMBERS).tolist()
            if split_of(numbers) == self.split and (found := solutions(tuple(sorted(numbers)))):
                return _example(numbers, found[int(rng.integers(len(found)))])
        raise ValueError(f"no {self.split} puzzle in {splits.MAX_DRAWS} draws for {self}")

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for any right chain of equations; see `dlm.tasks.countdown.is_solution`."""
        return score_equations(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Digits, signs and separators: those of `Countdown`."""
        return Countdown().pieces


@dataclasses.dataclass(frozen=True)
class PublishedGame24(Loaded):
    """Puzzles of a CSV file with a column `Puzzles` ("1 1 4 6"), in its order.

    Attributes:
        path: the file.
        held_out: whether only those are kept that no training stream of `Game24` has.
        examples: those that have an answer, with the first of `solutions`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no puzzle, or none is left.
    """

    path: str | os.PathLike[str]
    held_out: bool = False
    examples: tuple[tasks.Example, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        file = pathlib.Path(self.path)
        if not file.is_file():
            raise FileNotFoundError(f"path={str(self.path)!r} is not a file; give a CSV file")
        examples = []
        for line in csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()):
            try:
                numbers = list(map(int, line["Puzzles"].split()))
            except (KeyError, ValueError, AttributeError) as error:
                raise ValueError(f"{file}: {line} has no numbers in Puzzles ({error!r})") from error
            if self.held_out and split_of(numbers) != "test":
                continue
            if found := solutions(tuple(sorted(numbers))):
                examples.append(_example(numbers, found[0]))
        if not examples:
            raise ValueError(f"{file} has no puzzle that can be asked")
        object.__setattr__(self, "examples", tuple(examples))

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for any right chain of equations; see `dlm.tasks.countdown.is_solution`."""
        return score_equations(example, completion)
