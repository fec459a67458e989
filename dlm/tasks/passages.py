"""How texts go on: paragraphs of a file, of which the first words are given.

For open-ended generation, where any good text is right: what is measured there are properties of
the text, such as `decode.evaluation.diversity`. WikiText-2's `valid.txt` is such a file (Merity et
al., "Pointer Sentinel Mixture Models", arXiv:1609.07843).
"""

import dataclasses
import os
import pathlib

from dlm import tasks
from dlm.tasks.loaded import Loaded


@dataclasses.dataclass(frozen=True)
class Passages(Loaded):
    """Paragraphs of a text file, one per line, in its order.

    Attributes:
        path: the file.
        prompt_words: words that are given, at least 1.
        min_words: words, at least, that a paragraph goes on for, at least 1; shorter ones, and
            headings (` = Heading = `), are left out.
        examples: read when the task is created.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a number is too small, or no paragraph is long enough.
    """

    path: str | os.PathLike[str]
    prompt_words: int = 32
    min_words: int = 32
    examples: tuple[tasks.Example, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("prompt_words", "min_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        file = pathlib.Path(self.path)
        if not file.is_file():
            raise FileNotFoundError(f"path={str(self.path)!r} is not a file; give a text file")
        examples = []
        for line in file.read_text(encoding="utf-8-sig").split("\n"):
            words = line.split()
            is_heading = words[:1] == ["="]
            if is_heading or len(words) < self.prompt_words + self.min_words:
                continue
            given, rest = words[: self.prompt_words], words[self.prompt_words :]
            about = {"operation": file.stem}
            examples.append(tasks.Example(" ".join(given), " " + " ".join(rest), about))
        if not examples:
            raise ValueError(
                f"{file} has no paragraph of prompt_words + min_words = "
                f"{self.prompt_words + self.min_words} words"
            )
        object.__setattr__(self, "examples", tuple(examples))

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """1.0 where the words are those of the file, which says little: see above."""
        return tasks.exact_match(example, completion)
