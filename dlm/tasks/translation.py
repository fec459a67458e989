"""Translation from files of sentences, line by line: Multi30k's.

    Zwei Männer spielen Schach.
    Two men are playing chess.

The prompt is a sentence and a line break, the answer its translation.

Reference: Elliott et al., "Multi30K: Multilingual English-German Image Descriptions",
arXiv:1605.00459, task 1. Its captions are for research only.
"""

import dataclasses
import gzip
import os
import pathlib

from dlm import tasks
from dlm.tasks import bleu, splits
from dlm.tasks.loaded import Loaded

FILES = {"train": "train", "test": "val"}  # by split; the published test files are not used here
LANGUAGES = ("de", "en")


@dataclasses.dataclass(frozen=True)
class Translation(Loaded):
    """Pairs of sentences of `{train,val}.{de,en}.gz`, in the order of the files.

    Attributes:
        path: the folder of these files.
        source: language of the prompts, "de" or "en"; the answers are in the other one.
        split: "train", or "test": the validation file.
        examples: one per line, read when the task is created.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the two files do not have as many lines, or one is empty.
    """

    path: str | os.PathLike[str]
    source: str = "de"
    split: str = "train"
    examples: tuple[tasks.Example, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        splits.check_split(self.split)
        if self.source not in LANGUAGES:
            raise ValueError(f"source={self.source!r} must be 'de' or 'en'")
        target = LANGUAGES[1 - LANGUAGES.index(self.source)]
        sources, targets = self._read(self.source), self._read(target)
        if len(sources) != len(targets):
            raise ValueError(
                f"{self._file(self.source)} has {len(sources)} lines and {self._file(target)} "
                f"{len(targets)}: they must have as many"
            )
        about = {"operation": f"{self.source} to {target}"}
        examples = []
        for i, (source, right) in enumerate(zip(sources, targets, strict=True)):
            if not source or not right:
                raise ValueError(f"{self.where(i)} is empty, or its translation is")
            examples.append(tasks.Example(f"{source}\n", right, about))
        object.__setattr__(self, "examples", tuple(examples))

    def where(self, index: int) -> str:
        """File and line of an example."""
        return f"{self._file(self.source)}, line {index + 1}"

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """BLEU of the sentence, over 100; of a corpus it is no mean, see `dlm.tasks.bleu`.

        Returns:
            "score": `sentence_bleu` / 100. "exact": 1.0 where the words are the reference's.
        """
        references = [example.completion]
        exact = bleu.words(completion) == bleu.words(example.completion)
        score = bleu.sentence_bleu(completion, references) / 100
        return {"score": score, "exact": float(exact)}

    def _file(self, language: str) -> pathlib.Path:
        return pathlib.Path(self.path) / f"{FILES[self.split]}.{language}.gz"

    def _read(self, language: str) -> list[str]:
        file = self._file(language)
        if not file.is_file():
            raise FileNotFoundError(f"path={str(self.path)!r} has no {file.name}")
        text = gzip.decompress(file.read_bytes()).decode("utf-8")
        return [line.strip() for line in text.rstrip("\n").split("\n")]
