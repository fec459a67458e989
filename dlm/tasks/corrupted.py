"""Clean sentences with mistakes put into them: what a corrector learns from.

Sentences are those of text files, with spaces around punctuation as JFLEG writes them. Mistakes are
those that learners make: articles and prepositions that are missing, added or others, endings,
spelling, order, a comma or a capital left out. Which ones, follows from the seed and the number of
the example alone.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable

import numpy as np

from dlm import tasks
from dlm.tasks import rewriting, splits

_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|[0-9]+|[^\sA-Za-z0-9]")
_ARTICLES = ("a", "an", "the")
_PREPOSITIONS = ("in", "on", "at", "of", "to", "for", "with", "from", "by")
_ENDINGS = ("s", "ed", "ing", "ly")


@functools.cache
def read_sentences(path: str, split: str, most_chars: int) -> tuple[str, ...]:
    """Sentences of four words and more of a text file, or of all `*.txt` of a folder.

    Args:
        path: the file or folder.
        split: "train" or "test", by a hash of the sentence.
        most_chars: of a sentence, spaces around punctuation included.

    Raises:
        FileNotFoundError: there is no such text.
        ValueError: it has no such sentence.
    """
    root = pathlib.Path(path)
    files = [root] if root.is_file() else sorted(root.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"path={path!r} is neither a text nor a folder with *.txt in it")
    found: dict[str, None] = {}
    for file in files:
        for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", file.read_text(encoding="utf-8-sig")):
            sentence = " ".join(_WORD.findall(part))
            is_one = re.fullmatch(r"[A-Z][a-z ].*[a-z]{3} [.!?]", sentence) and sentence.isascii()
            if is_one and sentence.count(" ") >= 4 and len(sentence) <= most_chars:
                found[sentence] = None
    kept = tuple(s for s in found if splits.split_of(s) == split)
    if not kept:
        raise ValueError(f"path={path!r} must have sentences of at most {most_chars} characters")
    return kept


@dataclasses.dataclass(frozen=True)
class Corrupted(splits.Stream):
    """Sentences with mistakes, to be written without them; some have none.

    No sentence is in both splits.

    Attributes:
        path: a text file, or a folder of `*.txt`.
        max_mistakes: in a sentence, at least 1.
        most_chars: of a sentence, at least 20.
    """

    path: str | os.PathLike[str] = ""
    max_mistakes: int = 3
    most_chars: int = 160

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_mistakes", 1), ("most_chars", 20)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        read_sentences(str(self.path), self.split, self.most_chars)

    def __getitem__(self, index: int) -> tasks.Example:
        rng = self._rng(index)
        sentences = read_sentences(str(self.path), self.split, self.most_chars)
        sentence = sentences[int(rng.integers(len(sentences)))]
        num = int(rng.integers(self.max_mistakes + 1))
        source = corrupt(rng, sentence, num)
        return tasks.Example(
            prompt=rewriting.write_prompt(rewriting.CORRECT, source),
            completion=sentence,
            metadata={"operation": "corrupted", "source": source, "references": [sentence]},
        )

    def score(self, example: tasks.Example, completion: str) -> dict[str, float]:
        """As of JFLEG; see `rewriting.score_rewriting`."""
        return rewriting.score_rewriting(example, completion)


def corrupt(rng: np.random.Generator, sentence: str, num: int) -> str:
    """A sentence with so many mistakes, as far as they find a place; some undo each other."""
    words = sentence.split()
    for _ in range(num):
        mistake = _MISTAKES[int(rng.integers(len(_MISTAKES)))]
        words = mistake(rng, words)
    return " ".join(words)


def _place(rng: np.random.Generator, words: list[str], fits: Callable[[str], object]) -> int | None:
    """A place at random whose word fits."""
    places = [i for i, word in enumerate(words) if fits(word)]
    return places[int(rng.integers(len(places)))] if places else None


def _drop(rng: np.random.Generator, words: list[str]) -> list[str]:
    small = (*_ARTICLES, *_PREPOSITIONS, ",")
    i = _place(rng, words, lambda word: word in small)
    return words if i is None else [*words[:i], *words[i + 1 :]]


def _add(rng: np.random.Generator, words: list[str]) -> list[str]:
    small = (*_ARTICLES, *_PREPOSITIONS)
    i = int(rng.integers(1, len(words)))
    return [*words[:i], small[int(rng.integers(len(small)))], *words[i:]]


def _confuse(rng: np.random.Generator, words: list[str]) -> list[str]:
    others: tuple[str, ...] = _PREPOSITIONS if rng.random() < 0.5 else _ARTICLES
    i = _place(rng, words, lambda word: word in others)
    if i is None:
        return words
    return [*words[:i], others[int(rng.integers(len(others)))], *words[i + 1 :]]


def _end(rng: np.random.Generator, words: list[str]) -> list[str]:
    """Another ending, or none."""
    i = _place(rng, words, lambda word: word.isalpha() and len(word) > 3)
    if i is None:
        return words
    ending = next((e for e in _ENDINGS if words[i].endswith(e)), "")
    others = [e for e in ("", *_ENDINGS[:3]) if e != ending]
    stem = words[i][: len(words[i]) - len(ending)]
    return [*words[:i], stem + others[int(rng.integers(len(others)))], *words[i + 1 :]]


def _misspell(rng: np.random.Generator, words: list[str]) -> list[str]:
    """A letter is missing, doubled, or behind the next one."""
    i = _place(rng, words, lambda word: word.isalpha() and len(word) > 3)
    if i is None:
        return words
    word, j = words[i], int(rng.integers(1, len(words[i]) - 1))
    spelled = (
        word[:j] + word[j + 1 :],
        word[:j] + word[j] + word[j:],
        word[:j] + word[j + 1] + word[j] + word[j + 2 :],
    )
    return [*words[:i], spelled[int(rng.integers(3))], *words[i + 1 :]]


def _swap(rng: np.random.Generator, words: list[str]) -> list[str]:
    i = int(rng.integers(len(words) - 2))  # the full stop stays
    return [*words[:i], words[i + 1], words[i], *words[i + 2 :]]


def _lower(rng: np.random.Generator, words: list[str]) -> list[str]:
    i = _place(rng, words, lambda word: word[0].isupper())
    return words if i is None else [*words[:i], words[i].lower(), *words[i + 1 :]]


_MISTAKES = (_drop, _drop, _add, _confuse, _end, _end, _misspell, _misspell, _swap, _lower)
