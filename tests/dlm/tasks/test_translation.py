"""Pairs of files, and BLEU: sacreBLEU's own numbers, counted by hand and as it says them."""

import doctest
import gzip

import numpy as np
import pytest

from dlm.tasks import bleu, translation
from tests.lib.pairs import write_pairs
from tests.lib.paths import SHARED

DATA = SHARED / "data" / "multi30k"


def test_pairs_in_the_order_of_the_files(tmp_path):
    task = translation.Translation(write_pairs(tmp_path))
    assert (len(task), task[0].prompt) == (24, "Ein Mann läuft im Park.\n")
    assert task[0].completion == "A man runs in the park."
    back = translation.Translation(tmp_path, source="en", split="test")
    assert len(back) == len(back.loaded) == 12 and back[0].prompt == "A boy runs in the park.\n"
    assert back.where(0) == f"{tmp_path / 'val.en.gz'}, line 1"
    assert task.score(task[0], " A man runs in the park .") == {"score": 1.0, "exact": 1.0}
    part = task.score(task[0], "A man runs on the beach.")
    assert part["exact"] == 0 and 0.2 < part["score"] < 0.6
    assert task.score(task[0], "")["score"] == 0


def test_files_that_make_no_sense(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no train\.de\.gz"):
        translation.Translation(tmp_path)
    write_pairs(tmp_path)
    with pytest.raises(ValueError, match="source='fr' must be 'de' or 'en'"):
        translation.Translation(tmp_path, source="fr")
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    with pytest.raises(ValueError, match=r"has 24 lines and .*train\.en\.gz 2: they must have"):
        translation.Translation(tmp_path)
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"eins\n\n"))
    with pytest.raises(ValueError, match="has 1 lines"):  # an empty last one is none
        translation.Translation(tmp_path)
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b" \nzwei\n"))
    with pytest.raises(ValueError, match=r"train\.de\.gz, line 1 is empty"):
        translation.Translation(tmp_path)


def test_words_of_mteval():
    for text, expected in {
        "A man, in his 30's.": "A man , in his 30's .",
        "1,000.5 and .5 or 5.": "1,000.5 and . 5 or 5 .",
        "a well-known 2-3 (x/y) [z]": "a well-known 2 - 3 ( x / y ) [ z ]",
        'say &quot;x&quot; &amp; "y"': 'say " x " & " y "',
        "don't; a&b": "don't ; a & b",
        "ein „Wort“": "ein „Wort“",
    }.items():
        assert bleu.words(text) == expected.split()


def test_counts_by_hand():
    counted = bleu.counts("the the cat sat", ["the cat sat down", "a the cat"])
    #     length, nearest; matches of 1, 2, 3, 4 words: "the" counts once; all of them
    assert counted.tolist() == [4, 4, 3, 2, 1, 0, 4, 3, 2, 1]
    assert bleu.counts("a b c", ["x x", "x x x x"])[1] == 2  # of equally near ones the shorter
    precision = 3 / 4 * 2 / 3 * 1 / 2 * (1 / 2) / 1  # none of four words counts as half a match
    assert bleu.bleu(counted) == pytest.approx(100 * precision**0.25)


# By sacreBLEU 2.6, with its defaults.
TEXTS = ["A man runs in a park.", "Two dogs play with the red ball.", "people walking"]
RIGHT = [
    ["A man is running in the park.", "A man runs through a park."],
    ["Two dogs are playing with a red ball.", "Two dogs play with the ball."],
    ["People are walking down the street.", "People walk."],
]
CORPUS, SENTENCES = 53.4284123684, [42.7287006396, 69.1441569284, 30.3265329856]


def test_the_numbers_of_sacrebleu():
    every = [bleu.counts(text, right) for text, right in zip(TEXTS, RIGHT, strict=True)]
    assert bleu.bleu(sum(every)) == pytest.approx(CORPUS, abs=1e-9)
    ours = [bleu.sentence_bleu(text, right) for text, right in zip(TEXTS, RIGHT, strict=True)]
    np.testing.assert_allclose(ours, SENTENCES, atol=1e-9)
    assert bleu.sentence_bleu("a b", ["a b c d e f"]) == pytest.approx(13.533528323661)  # brevity
    assert bleu.sentence_bleu("a x y z", ["a b c d"]) == pytest.approx(15.973577606157)
    assert bleu.sentence_bleu("a", ["a"]) == pytest.approx(100)
    # A corpus has four orders or none.
    assert bleu.bleu(bleu.counts("a", ["a"])) == bleu.bleu(bleu.counts("", ["a"])) == 0
    sacrebleu = pytest.importorskip("sacrebleu")
    theirs = sacrebleu.corpus_bleu(TEXTS, [*map(list, zip(*RIGHT, strict=True))]).score
    assert theirs == pytest.approx(CORPUS)


def test_the_oracle_chooses_the_first_of_the_best():
    assert bleu.oracle(["a dog", "a man runs", "a man runs"], ["a man runs here"]) == 1


def test_docstring_examples():
    result = doctest.testmod(bleu)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not there")
def test_published_files():
    task, held_out = (translation.Translation(DATA, split=split) for split in ("train", "test"))
    assert (len(task), len(held_out)) == (29_000, 1_014)
    assert task[0].completion == "Two young, White males are outside near many bushes."
