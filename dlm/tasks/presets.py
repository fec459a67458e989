"""What recipes, studies and comparisons agree on about each task: one table.

Lengths are in tokens of the task's own word tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from dlm.tasks import Task
from dlm.tasks.countdown import Countdown
from dlm.tasks.game24 import Game24
from dlm.tasks.scan import Scan
from dlm.tasks.sudoku import Sudoku
from dlm.tasks.waiting_line import WaitingLine
from dlm.tasks.word_problems import WordProblems


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPreset:
    """A task as models are trained and measured on it.

    Attributes:
      make: makes the task; takes its split.
      gen_len: tokens per answer, end-of-text included; a multiple of `block_len`.
      prompt_len: tokens of the longest prompt; 0: no recipe trains on the task.
      block_len: positions per block when it is decoded in blocks; 0: no recipe does.
      delimiter: text at whose tokens AdaBlock may end a block; "": none.
      groups: examples reported together, by their operation; None: one group per operation.
    """

    make: Callable[..., Task]
    gen_len: int
    prompt_len: int = 0
    block_len: int = 0
    delimiter: str = ""
    groups: Mapping[str, Sequence[str]] | None = None


_AT_A_POSITION = ("insert", "remove", "replace")
TASKS = {
    "waiting_line": TaskPreset(
        make=functools.partial(WaitingLine, num_shots=0),
        prompt_len=28,  # the longest has 27
        gen_len=24,  # the longest has 23
        block_len=8,
        delimiter='", "',
        groups={  # sorting belongs to neither
            "one right answer": ("copy", "reverse", *(f"{o}_index" for o in _AT_A_POSITION)),
            "many right answers": ("shuffle", *(f"{o}_random" for o in _AT_A_POSITION)),
        },
    ),
    "scan": TaskPreset(
        make=Scan,
        prompt_len=12,  # the longest has 11
        gen_len=52,  # the longest has 49
        block_len=13,
    ),
    "word_problems": TaskPreset(
        make=WordProblems,
        prompt_len=28,  # the longest has 27
        gen_len=24,  # the longest has 22
        block_len=8,
        delimiter=" ",
    ),
    "countdown": TaskPreset(
        make=Countdown,
        prompt_len=15,  # the longest has 15
        gen_len=36,  # the longest has 35
        delimiter=",",
    ),
    "countdown_3": TaskPreset(
        make=functools.partial(Countdown, num_numbers=3),
        prompt_len=12,  # the longest has 12
        gen_len=24,  # the longest has 22
        delimiter=",",
    ),
    "game24": TaskPreset(
        make=Game24,
        prompt_len=12,  # the longest has 12
        gen_len=32,  # the longest has 31
        delimiter=",",
    ),
    "sudoku": TaskPreset(make=Sudoku, gen_len=24, delimiter="\n"),
}
RECIPES = tuple(name for name, preset in TASKS.items() if preset.block_len)  # see `configs`
