"""BLEU, as sacreBLEU computes it by default: one reference or more, case counts, no downloads.

References: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL
2002; Post, "A Call for Clarity in Reporting BLEU Scores", arXiv:1804.08771. Words are those of
mteval-v13a ("13a", `words`); orders without a match are smoothed as NIST does ("exp"): the n-th of
them counts as 2^-n matches. Scores of single sentences leave out orders for which they are too
short ("effective order").

A text is counted once (`counts`); a corpus is scored by the sum of its texts' counts, so that
intervals over texts need no more counting.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

ORDER = 4  # longest n-grams

# What mteval-v13a writes as a word of its own: punctuation and symbols, full stops and commas but
# not between digits, hyphens only behind digits, apostrophes never.
_SYMBOL = re.compile(r"([!-&(-+:-@\[-`{-~/])")
_BEHIND_NO_DIGIT = re.compile(r"([^0-9])([.,])")
_BEFORE_NO_DIGIT = re.compile(r"([.,])([^0-9])")
_HYPHEN = re.compile(r"([0-9])(-)")
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def words(text: str) -> list[str]:
    """The words of a text, punctuation apart.

    Example:
      >>> words("It's 1,000 km, she said.")
      ["It's", '1,000', 'km', ',', 'she', 'said', '.']
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for written, meant in _ENTITIES:
        text = text.replace(written, meant)
    text = _SYMBOL.sub(r" \1 ", f" {text} ")
    text = _BEHIND_NO_DIGIT.sub(r"\1 \2 ", text)
    text = _BEFORE_NO_DIGIT.sub(r" \1 \2", text)
    return _HYPHEN.sub(r"\1 \2 ", text).split()


def ngrams(sequence: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    """All n neighbours of a sequence, from left to right."""
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def counts(text: str, references: Sequence[str]) -> npt.NDArray[np.int64]:
    """What BLEU knows of a text.

    Args:
      text: what was written.
      references: at least one text that would be right.

    Returns:
      [2 ORDER + 2] int64: words of the text; words of the reference whose length is nearest, of
      equals the shorter one; per order its n-grams that a reference has, each as often as the
      reference that has it most; per order all of its n-grams.
    """
    ours, theirs = words(text), [words(reference) for reference in references]
    nearest = min((abs(len(their) - len(ours)), len(their)) for their in theirs)[1]
    matches, totals = [], []
    for n in range(1, ORDER + 1):
        most: collections.Counter[tuple[str, ...]] = collections.Counter()
        for their in theirs:
            most |= collections.Counter(ngrams(their, n))
        matches.append((collections.Counter(ngrams(ours, n)) & most).total())
        totals.append(max(len(ours) - n + 1, 0))
    return np.array([len(ours), nearest, *matches, *totals])


def bleu(counted: npt.ArrayLike, effective_order: bool = False) -> float:
    """BLEU in [0, 100].

    Args:
      counted: [2 ORDER + 2]. `counts` of a text, or their sum over a corpus.
      effective_order: whether orders of which there are no n-grams are left out. For sentences.
    """
    length, right_length, *rest = np.asarray(counted, float).tolist()
    matches, totals = rest[:ORDER], rest[ORDER:]
    if not any(matches):
        return 0.0
    log_sum, order, smoothing = 0.0, ORDER, 1.0
    for n, (match, total) in enumerate(zip(matches, totals, strict=True)):
        if not total:
            order = n
            break
        if not match:
            smoothing *= 2
        log_sum += math.log((match or 1 / smoothing) / total)
    if order < ORDER and not effective_order:
        return 0.0
    brevity = min(1 - right_length / length, 0.0)
    return 100 * math.exp(brevity + log_sum / order)


def sentence_bleu(text: str, references: Sequence[str]) -> float:
    """BLEU in [0, 100] of one sentence, with the effective order."""
    return bleu(counts(text, references), effective_order=True)


def oracle(texts: Sequence[str], references: Sequence[str]) -> int:
    """Which of several texts is the best by `sentence_bleu`, of equals the first."""
    scores = [sentence_bleu(text, references) for text in texts]
    return scores.index(max(scores))
