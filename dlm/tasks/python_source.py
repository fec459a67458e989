"""The sources of Python's own standard library, as they are installed here: a real text to learn.

An example is a passage of one file, cut in two. Nothing is downloaded; another Python version gives
other passages.
"""

import dataclasses
import functools
import pathlib
import sysconfig

from dlm import tasks
from dlm.tasks import splits


@functools.cache
def _texts(split: str) -> tuple[str, ...]:
    """ASCII sources of one split, modules and packages alike, tests aside; by name."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        name = str(path.relative_to(root))
        is_text = not name.startswith(("test/", "idlelib/", "lib2to3/", "site-packages/"))
        if is_text and splits.split_of(name) == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.isascii():
                found.append(text)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class PythonSource(tasks.Task):
    """Passages of the standard library, each file wholly in train or test.

    Attributes:
        prompt_chars: characters given.
        completion_chars: characters that follow.
        stride: from one passage of a file to the next, in characters.
        split: "train" or "test".
    """

    prompt_chars: int = 64
    completion_chars: int = 128
    stride: int = 96
    split: str = "train"

    def __post_init__(self) -> None:
        for name in ("prompt_chars", "completion_chars", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        splits.check_split(self.split)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tasks.Example:
        text, start = self._places[splits.check_index(index, len(self))]
        middle = start + self.prompt_chars
        return tasks.Example(
            prompt=_texts(self.split)[text][start:middle],
            completion=_texts(self.split)[text][middle : middle + self.completion_chars],
            metadata={"operation": "python"},
        )

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """The share of characters, from the first on, that are those of the file."""
        same = 0
        for ours, theirs in zip(example.completion, completion, strict=False):
            if ours != theirs:
                break
            same += 1
        return {"score": same / len(example.completion)}

    @functools.cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        length = self.prompt_chars + self.completion_chars
        return tuple(
            (i, start)
            for i, text in enumerate(_texts(self.split))
            for start in range(0, len(text) - length + 1, self.stride)
        )
