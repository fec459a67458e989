"""A tokenizer that is learned: what it covers, what it merges, and that it is kept."""

import doctest

import pytest

from dlm import bpe
from dlm.bpe import learn_bpe
from dlm.hf.tokenizer import load_tokenizer

TEXTS = ["ein Hund läuft", "ein Hund, ein Mann", "der Hund schläft"]


def test_what_comes_up_is_merged_and_anything_is_covered(tmp_path):
    tokenizer = learn_bpe(TEXTS, 280)
    assert tokenizer.vocab_size == 280 and tokenizer.mask_token_id == 279
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 278
    assert len(tokenizer.encode(" Hund")) == 1 < len(tokenizer.encode(" Katze"))
    for text in (*TEXTS, "Ünï\ncode\t\N{SNOWMAN}", "  zwei  ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>") == [278]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert again.vocab_size == 280 and again.eos_token_id == 278


def test_texts_may_have_too_few_pairs():
    assert learn_bpe(["aa"], 4096).vocab_size == 259  # of which one is a pair
    with pytest.raises(ValueError, match="vocab_size=257 must be at least 258: the bytes"):
        learn_bpe(TEXTS, 257)


def test_docstring_examples():
    result = doctest.testmod(bpe)
    assert result.attempted > 0 and result.failed == 0
