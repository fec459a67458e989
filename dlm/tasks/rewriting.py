"""Texts to be written again with small changes: grammar (JFLEG), simplification (ASSET).

    Correct the grammar of this sentence.
    Input:
    For not use car .
    Output:

What stands between the two marks is the source, which a drafter may copy
(`decode.speculative.drafters.input_guided`); code to be edited has the same form
(`dlm.tasks.code_edits`), and so has what corrects are trained on (`dlm.tasks.corrupted`).

References:

  * Napoles et al., "JFLEG: A Fluency Corpus and Benchmark for Grammatical Error Correction",
    arXiv:1702.04066;
  * Alva-Manchego et al., "ASSET: A Dataset for Tuning and Evaluation of Sentence Simplification
    Models", arXiv:2005.00481.
"""

import dataclasses
import os
import pathlib

from dlm import tasks
from dlm.tasks.loaded import Loaded

OPENING, CLOSING = "Input:\n", "\nOutput:"
CORRECT = "Correct the grammar of this sentence."
SIMPLIFY = "Rewrite this sentence in simple words."


def write_prompt(instruction: str, source: str) -> str:
    """What to do, and the text to do it to, between the marks."""
    return f"{instruction}\n{OPENING}{source}{CLOSING}\n"


def similarity(ours: str, theirs: str) -> float:
    """1 where two texts have the same words, 0 where they share none: 1 - edits / longer length.

    Edits are insertions, deletions and replacements of words.
    """
    a, b = ours.split(), theirs.split()
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return 1 - row[-1] / max(len(a), len(b), 1)


def score_rewriting(example: tasks.Example, completion: str) -> dict[str, float]:
    """How close the first line of an answer is to the closest reference, white space aside.

    Returns:
        "score": `similarity`. "exact": 1.0 where the words are those of a reference. "copied":
        `similarity` to the source.
    """
    answer = completion.strip().partition("\n")[0]
    score = max(similarity(answer, reference) for reference in example.metadata["references"])
    copied = similarity(answer, example.metadata["source"])
    return {"score": score, "exact": float(score == 1), "copied": copied}


@dataclasses.dataclass(frozen=True)
class Rewriting(Loaded):
    """Sentences of one file and what they became in others, line by line.

    Attributes:
        source: the file of sentences.
        references: files of their rewritings; the first one's are the completions.
        instruction: what the prompt asks for.
        operation: the name of all examples.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no references, or files do not have as many lines.
    """

    source: str | os.PathLike[str]
    references: tuple[str | os.PathLike[str], ...]
    instruction: str
    operation: str
    examples: tuple[tasks.Example, ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("references=() must have at least one file")
        sources = _read_lines(self.source)
        every = [_read_lines(path) for path in self.references]
        for path, lines in zip(self.references, every, strict=True):
            if len(lines) != len(sources):
                raise ValueError(
                    f"{path} has {len(lines)} lines and {self.source} {len(sources)}: they must "
                    "have as many"
                )
        examples = [
            tasks.Example(
                write_prompt(self.instruction, source),
                right[0],
                {"operation": self.operation, "source": source, "references": right},
            )
            for source, *right in zip(sources, *every, strict=True)
        ]
        object.__setattr__(self, "examples", tuple(examples))

    def where(self, index: int) -> str:
        """File and line of an example."""
        return f"{self.source}, line {index + 1}"

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """See `score_rewriting`."""
        return score_rewriting(example, completion)


def jfleg(folder: str | os.PathLike[str], split: str = "dev") -> Rewriting:
    """Sentences of learners of English, corrected by four people; `dev.src`, `dev.ref0` to 3."""
    root = pathlib.Path(folder)
    references = tuple(root / f"{split}.ref{i}" for i in range(4))
    return Rewriting(root / f"{split}.src", references, CORRECT, "jfleg")


def asset(folder: str | os.PathLike[str], split: str = "valid") -> Rewriting:
    """Sentences of Wikipedia in simpler words; `valid.orig` and every `valid.simp.*`."""
    root = pathlib.Path(folder)
    references = tuple(sorted(root.glob(f"{split}.simp.*")))
    return Rewriting(root / f"{split}.orig", references, SIMPLIFY, "asset")


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file; give a file of sentences")
    return [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")]
