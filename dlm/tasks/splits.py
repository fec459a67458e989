"""Endless train and test streams that cannot overlap.

A generated task draws instances until one falls into the wanted split. The split of an instance is
a hash of the instance itself, so whatever the seed or index, no instance can be in both streams.
"""

import dataclasses
import hashlib
import operator
from typing import Self

import numpy as np

from dlm import tasks

SPLITS = ("train", "test")
TEST_PERCENT = 20

# Draws until a stream is given up as empty (some seconds), for fields that allow next to nothing.
MAX_DRAWS = 100_000


def split_of(instance: str) -> str:
    """The split of an instance: "test" for 20 % of all texts, by SHA-256, so stable everywhere."""
    digest = hashlib.sha256(instance.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 100 < TEST_PERCENT else "train"


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "train" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train' or 'test'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream(tasks.Task):
    """A generated task, which has as many examples as one likes.

    Attributes:
      split: "train" or "test".
      seed: at least 0; another seed is another stream.
      num_examples: length of the stream, at least 1.
    """

    split: str = "train"
    seed: int = 0
    num_examples: int = 10_000

    def __post_init__(self) -> None:
        check_split(self.split)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        if self.num_examples < 1:
            raise ValueError(f"num_examples={self.num_examples} must be at least 1")

    def __len__(self) -> int:
        return self.num_examples

    def first(self, num: int) -> Self:
        return dataclasses.replace(self, num_examples=num)

    def _rng(self, index: int) -> np.random.Generator:
        """The randomness of example `index`; IndexError if there is none."""
        index = check_index(index, self.num_examples)
        return np.random.default_rng([self.seed, index, SPLITS.index(self.split)])


def check_index(index: int, length: int) -> int:
    """`index` as an int; raises IndexError unless it is in [0, length)."""
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"index={index} must be in [0, {length})")
    return index
