"""Countdown: reach a target from given numbers by arithmetic, using every number once.

A prompt is "a,b,c,...,target", an answer is a chain of equations "44-15=29,79-29=50". An equation
takes two of the numbers at hand and puts its result in their place.
"""

import dataclasses
import os
import re

import numpy as np

from dlm import tasks
from dlm.tasks import jsonl, splits

_EQUATION = re.compile(r"([0-9]{1,12})([-+*/])([0-9]{1,12})=([0-9]{1,12})")


def _holds(left: int, symbol: str, right: int, result: int) -> bool:
    """Whether `left symbol right = result` exactly (a division must leave no remainder)."""
    if symbol == "+":
        return left + right == result
    if symbol == "-":
        return left - right == result
    if symbol == "*":
        return left * right == result
    return right != 0 and left == right * result


def is_solution(numbers: list[int], target: int, text: str) -> bool:
    """Whether `text` is a right chain of equations.

    Every equation must be true, take numbers that are at hand (each once; results are at hand from
    then on), and after the last one only `target` may be left, so all numbers have been used. Zero
    may occur as a result, negative numbers and fractions may not. Spaces are ignored.
    """
    at_hand: list[int] | None = list(numbers)
    for equation in re.sub(r"\s", "", text).split(","):
        at_hand = at_hand and _after(at_hand, equation)
    return at_hand == [target]


def _after(at_hand: list[int], equation: str) -> list[int] | None:
    """The numbers at hand behind an equation; None if it is wrong."""
    match = _EQUATION.fullmatch(equation)
    if match is None:
        return None
    left, right, result = int(match[1]), int(match[3]), int(match[4])
    rest = list(at_hand)
    for number in (left, right):
        if number not in rest:
            return None
        rest.remove(number)
    return [*rest, result] if _holds(left, match[2], right, result) else None


def progress(prompt: str, text: str, is_whole: bool, target: int | None = None) -> float:
    """How right the beginning of an answer is: what a search over its equations is told.

    Args:
      prompt: of a puzzle.
      text: the beginning of an answer.
      is_whole: whether that is all of it.
      target: where the prompt does not say it, as in the game of 24.

    Returns:
      In [0, 1]: the share of what can be checked that is right. That is each equation that ends
      with a comma, and at the end the last one and whether the target is all that is left. What
      stands behind a wrong equation is wrong. 1.0 where nothing can be checked.
    """
    numbers = list(map(int, prompt.split(",")))
    goal = numbers.pop() if target is None else target
    equations = re.sub(r"\s", "", text).split(",")
    if not is_whole:
        equations.pop()
    num_right = 0
    at_hand: list[int] | None = numbers
    for equation in equations:
        at_hand = at_hand and _after(at_hand, equation)
        num_right += bool(at_hand)
    if is_whole:
        num_right += at_hand == [goal]
    total = len(equations) + is_whole
    return num_right / total if total else 1.0


def score_equations(example: tasks.Example, completion: str) -> dict[str, float]:
    """1.0 for any right chain of equations for the numbers and target in the prompt."""
    *numbers, target = map(int, example.prompt.split(","))
    return {"score": float(is_solution(numbers, target, completion))}


def load_countdown(path: str | os.PathLike[str]) -> jsonl.JsonlTask:
    """Puzzles from a JSON-lines file with texts `input` and `output`."""
    return jsonl.JsonlTask(path, "{input}\n", "{output}", score_equations)


@dataclasses.dataclass(frozen=True)
class Countdown(splits.Stream):
    """Random puzzles, made by applying random operations to random numbers.

    Results on the way are positive integers. The split is decided by the target and the numbers in
    whatever order, so no test puzzle is ever in the training stream.

    Attributes:
        num_numbers: numbers given, 2 to 6; the answer has one equation less.
        max_number: the largest number given, 10 to 999; numbers are uniform in [1, max_number].
        min_target: the smallest target, at least 1.
        max_target: the largest target. The narrower the range, the slower an example.
    """

    num_numbers: int = 4
    max_number: int = 99
    min_target: int = 10
    max_target: int = 99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.num_numbers <= 6:
            raise ValueError(f"num_numbers={self.num_numbers} must be in [2, 6]")
        if not 10 <= self.max_number <= 999:
            raise ValueError(f"max_number={self.max_number} must be in [10, 999]")
        if not 1 <= self.min_target <= self.max_target:
            raise ValueError(
                f"min_target={self.min_target} must be in [1, max_target={self.max_target}]"
            )

    def __getitem__(self, index: int) -> tasks.Example:
        rng = self._rng(index)
        for _ in range(splits.MAX_DRAWS):
            numbers = rng.integers(1, self.max_number + 1, self.num_numbers).tolist()
            equations, target = _combine(rng, numbers)
            if not self.min_target <= target <= self.max_target:
                continue
            if splits.split_of(",".join(map(str, [*sorted(numbers), target]))) == self.split:
                break
        else:
            raise ValueError(f"no {self.split} puzzle in {splits.MAX_DRAWS} draws for {self}")
        return tasks.Example(
            prompt=",".join(map(str, [*numbers, target])) + "\n",
            completion=",".join(equations),
            metadata={"operation": f"{self.num_numbers} numbers"},
        )

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for any right chain of equations; see `is_solution`."""
        return score_equations(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Digits, signs and separators."""
        return ("\n", ",", "=", *"+-*/", *"0123456789")


def _combine(rng: np.random.Generator, numbers: list[int]) -> tuple[list[str], int]:
    """Random equations that use up `numbers`, and the last result."""
    at_hand = list(numbers)
    equations = []
    while len(at_hand) > 1:
        left, right = (at_hand.pop(int(rng.integers(len(at_hand)))) for _ in range(2))
        options = [("+", left + right), ("*", left * right)]
        if left < right:
            left, right = right, left
        if left > right:
            options.append(("-", left - right))
        if left % right == 0:
            options.append(("/", left // right))
        symbol, result = options[int(rng.integers(len(options)))]
        equations.append(f"{left}{symbol}{right}={result}")
        at_hand.append(result)
    return equations, at_hand[0]
