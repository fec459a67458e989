"""What a model has written itself, token for token: for heads that foresee what it will do."""

import dataclasses
import os

import numpy as np

from dlm import tasks
from dlm.tasks.jsonl import read_records


@dataclasses.dataclass(frozen=True)
class OwnTexts(tasks.Task):
    """Lines of `python -m scripts.own_texts`: {"prompt": token ids, "completion": token ids}.

    A completion that ended holds its end-of-text; one without was cut at the longest length, which
    `data.completion_len` must not exceed, or it would be taken for one that ended there.

    Attributes:
      path: the file.
      texts: prompt and completion of every line, [n] and [m] int32.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line holds something else.
    """

    path: str | os.PathLike[str]
    texts: tuple[tuple[np.ndarray, np.ndarray], ...] = dataclasses.field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        texts = []
        for number, record in read_records(self.path):
            ids = [record.get(name) for name in ("prompt", "completion")]
            if not all(isinstance(x, list) and all(_is_id(t) for t in x) for x in ids):
                raise ValueError(
                    f"{self.path}, line {number}: prompt and completion must be lists of token ids"
                )
            prompt, completion = (np.array(x, np.int32) for x in ids)
            texts.append((prompt, completion))
        object.__setattr__(self, "texts", tuple(texts))

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tasks.Encoded:  # type: ignore[override]
        prompt, completion = self.texts[index]
        return tasks.Encoded(prompt, completion, np.arange(len(completion), dtype=np.int32))


def _is_id(token: object) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
