"""Endless train and test streams that cannot overlap.

A generated task draws instances until one falls into the wanted split. The split of an instance is
a hash of the instance itself, so whatever the seed or index, no instance can be in both streams.
"""

import hashlib
import operator
from typing import Any

import numpy as np

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


def check_stream(split: str, seed: int, num_examples: int) -> None:
    """Raises ValueError unless the three fields shared by all generated tasks are usable."""
    check_split(split)
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if num_examples < 1:
        raise ValueError(f"num_examples={num_examples} must be at least 1")


def rng_of(task: Any, index: int) -> np.random.Generator:
    """The randomness of one example of a stream with `seed`, `split` and `num_examples`.

    Raises:
      IndexError: `index` is not in [0, num_examples).
    """
    index = check_index(index, task.num_examples)
    return np.random.default_rng([task.seed, index, SPLITS.index(task.split)])


def check_index(index: int, length: int) -> int:
    """`index` as an int; raises IndexError unless it is in [0, length)."""
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"index={index} must be in [0, {length})")
    return index
