"""How much texts repeat themselves, and how much they differ from each other: shares of n-grams.

Sequences are of words or of token ids; what they are must be said beside every number.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Items = Sequence[Hashable]


def _ngrams(items: Items, n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def seq_rep(items: Items, n: int = 4) -> float:
    """seq-rep-n: the share in [0, 1) of a sequence's n-grams that came up before in it.

    0 where it is shorter than n. Reference: Welleck et al., "Neural Text Generation with
    Unlikelihood Training", arXiv:1908.04319.

    Raises:
      ValueError: n is below 1.
    """
    every = _ngrams(items, n)
    return 1 - len(set(every)) / len(every) if every else 0.0


def diversity(items: Items) -> float:
    """The product over n = 2, 3, 4 of 1 - seq-rep-n, in (0, 1]; 1: no pair comes up twice.

    Reference: Su et al., "A Contrastive Framework for Neural Text Generation", arXiv:2202.06417.
    """
    return math.prod(1 - seq_rep(items, n) for n in (2, 3, 4))


def distinct(sequences: Sequence[Items], n: int) -> float:
    """distinct-n: different n-grams of all sequences over the items of all, in [0, 1].

    0 where there are no items. Divided by the number of items, not of n-grams, as in Vijayakumar
    et al., "Diverse Beam Search", arXiv:1610.02424, after Li et al., arXiv:1510.03055.

    Raises:
      ValueError: n is below 1.
    """
    every = {ngram for items in sequences for ngram in _ngrams(items, n)}
    total = sum(map(len, sequences))
    return len(every) / total if total else 0.0
