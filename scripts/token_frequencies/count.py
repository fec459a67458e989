"""Shares of tokens in texts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dlm.tokenizer import Tokenizer


def frequencies(tokenizer: Tokenizer, texts: Iterable[str], vocab_size: int) -> np.ndarray:
    """Shares of tokens [V] float32.

    Args:
      tokenizer: of the model.
      texts: what is counted.
      vocab_size: V, rows of the model's embedding.

    Raises:
      ValueError: there are no tokens.
    """
    counts = np.zeros(vocab_size, np.int64)
    for text in texts:
        np.add.at(counts, tokenizer.encode(text), 1)
    total = counts.sum()
    if not total:
        raise ValueError("the texts have no tokens: give at least one file with text")
    return (np.maximum(counts, 1) / total).astype(np.float32)
