"""Tasks from TensorFlow Datasets in array_record format, read without TensorFlow."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlm import tasks
from dlm.tasks import jsonl, splits


def _open(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Sequence[Any]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "TfdsTask needs tensorflow-datasets; install it with: "
            "pip install tensorflow-datasets array_record importlib_resources"
        ) from error
    # download=False: a data set is prepared once, by hand, and never fetched behind one's back.
    try:
        source: Sequence[Any] = tfds.data_source(
            name, split=split, data_dir=data_dir, download=False
        )
    except (tfds.core.DatasetNotFoundError, NotImplementedError):
        raise FileNotFoundError(
            f"name={name!r} must be a data set prepared in array_record format under "
            f"data_dir={data_dir!r}, and there is none"
        ) from None  # the original lists every data set that TFDS knows
    except ValueError as error:
        raise ValueError(f"split={split!r} of {name!r} must have records: {error}") from error
    return source


def decode(value: Any) -> Any:
    """A record with bytes as UTF-8 text, arrays as lists and numpy scalars as Python's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return decode(value.tolist())
    if isinstance(value, list | tuple):
        return [decode(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True)
class TfdsTask(tasks.Task):
    """One example per record of a prepared TFDS data set.

    The data set must have been prepared with `file_format="array_record"`; nothing is downloaded.

    Example:
        >>> task = TfdsTask("my_set", "train", "Question: {question}\\nAnswer:", " {answer}")

    Attributes:
        name: TFDS name, such as "my_set" or "my_set/my_config:1.0.0".
        split: TFDS split, such as "train" or "train[:10%]".
        prompt: template over the record's fields, see `jsonl.render`; bytes are decoded.
        completion: template of the completion.
        data_dir: where prepared data sets live; None is TFDS's own default.
        scorer: called with (example, completion); exact match, white space aside, by default.
        source: the opened data source. Metadata of an example is its record and "operation", the
            data set's name.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        FileNotFoundError: the data set is not there, or not in array_record format.
        ValueError: there is no such split, it is empty, or its first record lacks a field of a
            template.
    """

    name: str
    split: str
    prompt: str
    completion: str
    data_dir: str | os.PathLike[str] | None = None
    scorer: tasks.Scorer = tasks.exact_match
    source: Sequence[Any] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", _open(self.name, self.split, self.data_dir))
        if not len(self):
            raise ValueError(f"split={self.split!r} of {self.name!r} must have records")
        self[0]  # a template that does not fit fails here, not in a data worker

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tasks.Example:
        index = splits.check_index(index, len(self))
        try:
            record = decode(self.source[index])
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(index)}: not UTF-8 ({error.reason})") from error
        return tasks.Example(
            prompt=jsonl.render(self.prompt, record, self.where(index)),
            completion=jsonl.render(self.completion, record, self.where(index)),
            metadata={"operation": self.name, **record},
        )

    def where(self, index: int) -> str:
        """Data set, split and record of an example."""
        return f"{self.name}, split {self.split}, record {index}"

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """Whatever `scorer` gives."""
        return self.scorer(example, completion)
