"""What models are asked to do: prompts, right answers and exact scorers, one file per family.

`Task` is the contract: a random-access collection that `grain.MapDataset.source` accepts, plus a
scorer. Nothing here needs more than numpy; optional packages are imported by the call that uses
them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """One question with one right answer.

    Attributes:
        prompt: text given to the model. It ends with its own separator (a newline or a marker), so
            that `prompt + completion` is a well-formed text to train on.
        completion: one right answer, the training target. Other answers may be right too.
        metadata: what the scorer needs beyond that. Always has the key "operation", a name to
            group tables by.
    """

    prompt: str
    completion: str
    metadata: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """An example as token ids, with the order in which a model decided them.

    Attributes:
      prompt: [n] int32.
      completion: [G] int32. Behind its first end-of-text token there is nothing else.
      step_map: [G] int32. The round that decided each position; -1: none did.
    """

    prompt: np.ndarray
    completion: np.ndarray
    step_map: np.ndarray


@dataclasses.dataclass(frozen=True)
class Arrays:
    """An example that is no text: something measured at every position.

    Attributes:
        values: [G, ...] by name. A batch has them, stacked, under the same names.
    """

    values: Mapping[str, np.ndarray]


Scorer = Callable[[Example, str], dict[str, float]]


class Task:
    """A random-access collection of examples with an exact scorer. Base class of dataclasses."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Example `index`, a function of the task's fields and `index` only.

        Raises:
            IndexError: `index` is not in [0, len(self)).
        """
        raise NotImplementedError

    def score(self, example: Example, completion: str) -> dict[str, float]:
        """Metrics of a model's answer; the key "score" is always there and lies in [0, 1]."""
        raise NotImplementedError

    def first(self, num: int) -> Self:
        """A task whose first `num` examples are these, and typical of it: a stream ends there."""
        return self

    def where(self, index: int) -> str:
        """What errors call example `index`, such as "data.jsonl, line 7"."""
        return f"example {index}"

    @property
    def pieces(self) -> tuple[str, ...]:
        """Texts into which longest match splits every prompt and completion without loss.

        (): texts come from no closed vocabulary.
        """
        return ()

    @property
    def loaded(self) -> Sequence[Example]:
        """All examples, if they are in memory; else (), and each is read when it is needed."""
        return ()


def exact_match(example: Example, completion: str) -> dict[str, float]:
    """1.0 where `completion` is the example's own, runs of white space counting as one space."""
    return {"score": float(completion.split() == example.completion.split())}
