"""Shares of n-grams, by hand."""

import pytest

from decode.evaluation.diversity import distinct, diversity, seq_rep


def test_what_a_text_repeats():
    text = ["a", "b", "a", "b", "a", "b"]  # ab ba ab ba ab; aba bab aba bab; abab baba abab
    assert seq_rep(text, 2) == pytest.approx(3 / 5)
    assert seq_rep(text, 3) == pytest.approx(2 / 4)
    assert seq_rep(text) == seq_rep(text, 4) == pytest.approx(1 / 3)
    assert diversity(text) == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)
    assert seq_rep([1, 2, 3, 1, 2, 4], 2) == pytest.approx(1 / 5)  # token ids, too
    assert seq_rep([7] * 101, 1) == pytest.approx(100 / 101)


def test_short_texts_repeat_nothing():
    assert seq_rep([], 1) == seq_rep([1, 2, 3], 4) == 0
    assert diversity([]) == diversity([1]) == 1
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        seq_rep([1], 0)


def test_how_texts_differ():
    texts = [["a", "b", "c"], ["a", "b", "d"]]
    assert distinct(texts, 1) == pytest.approx(4 / 6)
    assert distinct(texts, 2) == pytest.approx(3 / 6)  # over items, not over pairs
    assert distinct([texts[0]] * 2, 1) == pytest.approx(3 / 6)
    assert distinct([[], []], 1) == distinct([], 2) == 0
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        distinct(texts, 0)
