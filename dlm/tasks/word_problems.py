"""Word problems: small stories with numbers, solved step by step as GSM8K's are.

A prompt has a line per sentence, "Mia has 12 pears.", "Mia buys 9 pears.", "Mia doubles their
pears.", "How many pears?"; an answer is " 12+9=21 21*2=42 #### 42": the calculator annotations of a
GSM8K solution (Cobbe et al., arXiv:2110.14168) and the final number, by which it is scored. Every
step needs the result of the one before, so a decoder that commits all of them at once has to be
right about sums whose parts it has not written down.
"""

import dataclasses

import numpy as np

from dlm import tasks
from dlm.tasks import jsonl, splits

_NAMES = ("Mia", "Noah", "Ava", "Liam", "Zoe", "Omar", "Ines", "Kofi")
_THINGS = ("pears", "books", "coins", "shells", "stamps", "cards", "marbles", "pencils")
_VERBS = {"+": ("buys", "finds", "gets", "makes"), "-": ("sells", "loses", "gives away", "breaks")}
_TIMES = {2: "doubles", 3: "triples"}


@dataclasses.dataclass(frozen=True)
class WordProblems(splits.Stream):
    """Random stories. All numbers on the way are whole and in [1, 99].

    The split is decided by the arithmetic alone, so no chain of sums of the test is in the training
    stream in other words.

    Attributes:
        min_steps: fewest operations, at least 1.
        max_steps: most operations, at most 6.
        max_change: the largest number added or taken away, 2 to 98; the smallest is 2.
    """

    min_steps: int = 2
    max_steps: int = 3
    max_change: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.min_steps <= self.max_steps <= 6:
            raise ValueError(
                f"min_steps={self.min_steps} and max_steps={self.max_steps} must be in [1, 6] and "
                "in this order"
            )
        if not 2 <= self.max_change <= 98:
            raise ValueError(f"max_change={self.max_change} must be in [2, 98]")

    def __getitem__(self, index: int) -> tasks.Example:
        rng = self._rng(index)
        for _ in range(splits.MAX_DRAWS):
            steps = self._draw(rng)
            equations = " ".join(f"{a}{sign}{b}={result}" for a, sign, b, result in steps)
            if splits.split_of(equations) == self.split:
                break
        else:
            raise ValueError(f"no {self.split} problem in {splits.MAX_DRAWS} draws for {self}")
        return tasks.Example(
            prompt=_story(rng, steps),
            completion=f" {equations} #### {steps[-1][3]}",
            metadata={"operation": f"{len(steps)} steps"},
        )

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 for the right final number, as of GSM8K."""
        return jsonl.score_final_number(example, completion)

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names, things and the parts of sentences; numbers and signs."""
        verbs = [f" {verb}" for verb in (*_VERBS["+"], *_VERBS["-"], "has", *_TIMES.values())]
        endings = [" their", *(f" {thing}." for thing in _THINGS)]
        return (
            *_NAMES, *verbs, *endings, *(f" {thing}?" for thing in _THINGS),
            "How many", " ####", "\n", " ", *"+-*=", *map(str, range(1, 100)),
        )  # fmt: skip

    def _draw(self, rng: np.random.Generator) -> list[tuple[int, str, int, int]]:
        """Random steps: left, sign, right, result."""
        value = int(rng.integers(2, 100))
        steps = []
        for _ in range(int(rng.integers(self.min_steps, self.max_steps + 1))):
            options = [("*", factor) for factor in _TIMES if value * factor <= 99]
            if value <= 97:
                options.append(("+", int(rng.integers(2, min(self.max_change, 99 - value) + 1))))
            if value >= 3:
                options.append(("-", int(rng.integers(2, min(self.max_change, value - 1) + 1))))
            sign, right = options[int(rng.integers(len(options)))]
            result = {"+": value + right, "-": value - right, "*": value * right}[sign]
            steps.append((value, sign, right, result))
            value = result
        return steps


def _story(rng: np.random.Generator, steps: list[tuple[int, str, int, int]]) -> str:
    """Steps in words, a sentence each."""
    name = _NAMES[int(rng.integers(len(_NAMES)))]
    thing = _THINGS[int(rng.integers(len(_THINGS)))]
    sentences = [f"{name} has {steps[0][0]} {thing}."]
    for _, sign, right, _ in steps:
        if sign == "*":
            sentences.append(f"{name} {_TIMES[right]} their {thing}.")
        else:
            verb = _VERBS[sign][int(rng.integers(len(_VERBS[sign])))]
            sentences.append(f"{name} {verb} {right} {thing}.")
    return "\n".join([*sentences, f"How many {thing}?\n"])
