"""Rewards of whole texts: what PG-TD plans for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

from decode.evaluation.sandbox import Limits, run_program


@dataclasses.dataclass(frozen=True)
class ProgramTests:
    """The share of tests that a program passes, each in a sandbox of its own.

    A program that does not run passes none. See `decode.evaluation.sandbox` for its walls and
    limits. Texts may be rewarded for more than this, such as being short: a reward is any function
    of a prompt and what was written behind it.

    Example:
      >>> ProgramTests(("assert add(1, 2) == 3",))("def add(a, b):\n", "    return a + b\n")
      1.0

    Attributes:
      tests: Python source that raises unless a test is passed; at least one.
      setup: source that stands before each.
      has_prompt: whether the prompt is the beginning of the program.
      limits: of each test; None: `Limits()`.
    """

    tests: tuple[str, ...]
    setup: str = ""
    has_prompt: bool = True
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if not self.tests:
            raise ValueError("tests=() must have at least one")

    @classmethod
    def public(cls, tests: Sequence[str], setup: str = "", has_prompt: bool = True) -> Self:
        """The first half of some tests: what a search may see of them."""
        return cls(tuple(tests[: max(len(tests) // 2, 1)]), setup, has_prompt)

    def __call__(self, prompt: str, text: str) -> float:
        program = f"{prompt if self.has_prompt else ''}{text}\n{self.setup}\n"
        passed = [run_program(program + test, self.limits).is_passed for test in self.tests]
        return sum(passed) / len(passed)
