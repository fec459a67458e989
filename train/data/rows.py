"""Batches whose rows are not simply the next examples: all of a task's, packed texts, and buckets.

The latter two are iterators over encoded examples in the order of a `grain` data set. Their states
are small and survive JSON: they name examples, which are encoded again when a state is restored.

Letters: P prompt length, G completion length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grain
import numpy as np

Row = dict[str, np.ndarray]
Shape = tuple[int, int]  # (P, G)


def stack(rows: Iterable[Row]) -> Row:
    """Rows as one batch."""
    first, *others = rows
    return {name: np.stack([first[name], *(row[name] for row in others)]) for name in first}


def rows_of(num_rows: int, process: tuple[int, int]) -> slice:
    """Which rows of a batch are those of process (i, n): as many for each, in their order."""
    index, count = process
    return slice(num_rows * index // count, num_rows * (index + 1) // count)


class Whole(grain.DatasetIterator):
    """The same rows in every batch: all of a task's, for gradients without noise."""

    def __init__(self, batch: Row) -> None:
        super().__init__()
        self._batch = batch

    def __next__(self) -> Row:
        return self._batch

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass


class Packed(grain.DatasetIterator):
    """Texts one after another, cut into rows of G tokens; for pre-training.

    Nothing is dropped or padded. A row begins and ends anywhere in a text, and the texts in a row
    attend to each other, as usual: the EOS between them is all that tells them apart, unless rows
    say in "segment" which text each token is from. Rows of a long text come one after another, so
    a book should be several records.

    LLaDA (arXiv:2502.09992, Sec. 2.2) trains on such full rows of 4096 tokens, without a mask; how
    it joins texts is not said. It cuts 1 % of them to a random length, which is left out here: that
    would take shapes of its own.

    (`grain.experimental.ConcatThenSplitIterDataset` does the same, but in grain 0.2.18 its state
    skips a text when it is restored from JSON where a row ended with a text.)
    """

    def __init__(
        self,
        texts: grain.DatasetIterator,
        encode: Callable[[int], Row],
        num_rows: int,
        row_len: int,
        process: tuple[int, int] = (0, 1),
        keep_apart: bool = False,
    ) -> None:
        """Nothing is read yet.

        Args:
          texts: gives "tokens" [n] int32, with the EOS, and "index" [], which text of the task.
          encode: makes such a text of its index.
          num_rows: of a batch.
          row_len: G.
          process: whose rows are returned, see `rows_of`.
          keep_apart: whether rows have "segment" [G] int32: 0 up to the first end of a text, then
            1, and so on.
        """
        super().__init__(texts)
        self._encode = encode
        self._num_rows, self._row_len = num_rows, row_len
        self._process = process
        self._keep_apart = keep_apart
        self._index, self._offset = -1, 0  # the next token is this one of that text
        self._tokens = np.zeros(0, np.int32)

    def __next__(self) -> Row:
        parts, owners, begins = [], [], []
        missing = self._num_rows * self._row_len
        while missing:
            if self._offset >= len(self._tokens):
                text = next(self._parent)
                self._index, self._offset = int(text["index"]), 0
                self._tokens = text["tokens"]
            part = self._tokens[self._offset : self._offset + missing]
            parts.append(part)
            owners.append(np.full(len(part), self._index, np.int32))
            begins.append(np.arange(self._offset, self._offset + len(part)) == 0)
            self._offset += len(part)
            missing -= len(part)
        mine = rows_of(self._num_rows, self._process)
        completion, owner, begin = (
            np.concatenate(x).reshape(self._num_rows, self._row_len)[mine]
            for x in (parts, owners, begins)
        )
        begin[:, 0] = False
        apart = {"segment": np.cumsum(begin, axis=1, dtype=np.int32)} if self._keep_apart else {}
        num_rows = len(completion)
        return {
            "prompt": np.zeros((num_rows, 0), np.int32),
            "prompt_start": np.zeros(num_rows, np.int32),
            "completion": completion,
            "completion_len": np.full(num_rows, self._row_len, np.int32),
            "index": owner[:, 0],
            **apart,
        }

    def get_state(self) -> dict[str, Any]:
        return {"texts": self._parent.get_state(), "index": self._index, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["texts"])
        self._index, self._offset = state["index"], state["offset"]
        has_begun = self._index >= 0
        self._tokens = self._encode(self._index)["tokens"] if has_begun else self._tokens[:0]


class Bucketed(grain.DatasetIterator):
    """Rows of like lengths together, so that less of a batch is padding.

    Each row waits in the smallest bucket that it fits, and a bucket that is full is the next batch.
    What waits at the end of an epoch is part of a batch of the next one: every example comes once
    per epoch of the rows that are read, but perhaps later, and rare buckets seldom.

    Reference: Zelasko et al., "Training and Inference Efficiency of Encoder-Decoder Speech Models",
    arXiv:2503.05931, whose buckets are estimated from the data and drawn at random by the total
    length that waits in them. Here they are given and the order of the rows decides.
    """

    def __init__(
        self,
        rows: grain.DatasetIterator,
        encode: Callable[[int], Row],
        sizes: Mapping[Shape, int],
        process: tuple[int, int] = (0, 1),
    ) -> None:
        """Nothing is read yet.

        Args:
          rows: of the largest bucket's shape, with "index".
          encode: makes such a row of its index.
          sizes: rows per batch of each bucket, as `bucket_sizes`.
          process: whose rows of a batch are returned, see `rows_of`.
        """
        super().__init__(rows)
        self._encode = encode
        self._sizes = sizes
        self._process = process
        self._waiting: dict[Shape, list[Row]] = {shape: [] for shape in sizes}

    def __next__(self) -> Row:
        while True:
            for shape, rows in self._waiting.items():
                num = self._sizes[shape]
                if len(rows) >= num:
                    self._waiting[shape] = rows[num:]
                    return stack(rows[:num][rows_of(num, self._process)])
            self._add(next(self._parent))

    def get_state(self) -> dict[str, Any]:
        waiting = [int(row["index"]) for rows in self._waiting.values() for row in rows]
        return {"rows": self._parent.get_state(), "waiting": waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["rows"])
        self._waiting = {shape: [] for shape in self._sizes}
        for index in state["waiting"]:
            self._add(self._encode(index))

    def _add(self, row: Row) -> None:
        prompt_len = len(row["prompt"]) - int(row["prompt_start"])
        shape = next(
            (P, G) for P, G in self._sizes if prompt_len <= P and row["completion_len"] <= G
        )
        self._waiting[shape].append(crop(row, *shape))


def bucket_sizes(
    buckets: Iterable[Shape], largest: Shape, batch_size: int, multiple: int
) -> dict[Shape, int]:
    """Rows per batch of each bucket, smallest bucket first, for about as many tokens in each.

    Args:
      buckets: shapes beside the largest one.
      largest: every row fits it.
      batch_size: rows of the largest bucket, a multiple of `multiple`.
      multiple: what the number of rows must be a multiple of.
    """
    num_tokens = batch_size * sum(largest)
    return {
        shape: num_tokens // sum(shape) // multiple * multiple
        for shape in sorted({*buckets, largest}, key=lambda shape: (sum(shape), shape))
    }


def crop(row: Row, prompt_len: int, completion_len: int) -> Row:
    """A row without the padding that a smaller bucket has no room for.

    Args:
      row: see `train.data.encode_example`; what lies along the completion is cut with it.
      prompt_len: P of the bucket, at least the prompt's tokens.
      completion_len: G of the bucket, at least the row's `completion_len`.
    """
    cut = len(row["prompt"]) - prompt_len
    return {
        **{name: x[:completion_len] if x.ndim else x for name, x in row.items()},
        "prompt": row["prompt"][cut:],
        "prompt_start": row["prompt_start"] - np.int32(cut),
    }
