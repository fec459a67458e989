"""Where texts stop: tokens that stay, whole characters, special tokens."""

import dataclasses
import types

import numpy as np
import pytest
from tokenizers import processors

from decode.core.requests import encode
from decode.core.results import settled, to_text
from dlm.chat import Rendered
from dlm.tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    ("text", "stops", "left", "num_tokens"),
    [
        ("one two", [" two"], "one", 3),
        ("one two", ["two", "n"], "o", 1),  # the first in the text, not in the list
        ("one two", ["one"], "", 0),
        ("one two", ["three"], None, None),
        ("hi 🙂 END", ["END"], "hi 🙂 ", 8),
        ("hi 🙂END", ["END"], "hi 🙂", 7),  # all four bytes
        ("🙂🙂END", ["END"], "🙂🙂", 8),
        ("é🙂", ["🙂"], "é", 2),
        ("a<|startoftext|>b", ["<|startoftext|>"], "a", 1),
        ("a<|startoftext|>b", ["b"], "a", 2),
        ("a<|startoftext|>bc", ["|>b"], "a", 1),  # it begins inside the special token
        ("🙂<|startoftext|>\nc", ["<|startoftext|>\n"], "🙂", 4),
        ("a<|startoftext|>b\nc", ["\n"], "ab", 3),
        ("xabc", ["abc", "b"], "xa", 2),  # the first that is whole
        ("xabc", ["bc", "abc"], "x", 1),  # both at once: the longer one
    ],
)
def test_a_text_is_cut_before_the_first_stop(text, stops, left, num_tokens):
    tokenizer = byte_tokenizer()
    tokens = np.array(tokenizer.encode(text), np.int32)
    if left is None:
        assert to_text(tokenizer, tokens, stops) == (text, len(tokens), False)
    else:
        assert to_text(tokenizer, tokens, stops) == (left, num_tokens, True)


def test_where_a_text_is_cut_does_not_depend_on_when_it_is_looked_at():
    tokenizer = byte_tokenizer()
    tokens = np.array(tokenizer.encode("🙂xabcab"), np.int32)
    for stops in (["abc", "b"], ["bc", "xa", "ab"], ["xabc", "bca", "cab"]):
        found = [to_text(tokenizer, tokens[:n], stops) for n in range(len(tokens) + 1)]
        cuts = {(text, n) for text, n, was_cut in found if was_cut}
        assert len(cuts) == 1 and found[-1][2], (stops, found)


def test_what_no_token_behind_it_changes():
    tokenizer = byte_tokenizer()
    assert settled(tokenizer, [97, 0xF0, 0x9F]) == "a"
    assert settled(tokenizer, [97, 257, 98, 32]) == "a<|startoftext|>b "
    cleaning = dataclasses.replace(tokenizer, cleans_up=True)
    assert settled(cleaning, b"we do n '") == "we d"  # and so "don't" may follow
    for text in ("so we do n't care .", "a ' b ' s n ' t 're", "it  ' ve , you see ? !"):
        ids = list(text.encode())
        some = [settled(cleaning, ids[:n]) for n in range(len(ids) + 1)]
        assert all(cleaning.decode(ids).startswith(part) for part in some)
        assert len(set(some)) > 3


def test_a_character_that_never_ends_stays_as_it_is():
    tokens = np.array([*b"a\xf0\x9f", *b"END"], np.int32)
    text, n, was_cut = to_text(byte_tokenizer(), tokens, ["END"])
    assert (text, n, was_cut) == ("a\ufffd", 3, True)


def test_prompts_are_encoded_as_the_tokenizer_does():
    tokenizer = byte_tokenizer()
    begin = [("<|startoftext|>", 257)]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=begin
    )
    lm = types.SimpleNamespace(tokenizer=tokenizer)
    assert encode(lm, "Hi") == [257, 72, 105]
    assert encode(lm, "<|startoftext|>Hi") == [257, 72, 105]
    assert encode(lm, Rendered("Hi")) == [72, 105]  # a template that begins with nothing
    assert encode(lm, [72, 105]) == [72, 105]
    assert encode(lm, tokenizer.encode("<|endoftext|>", plain=True)) == list(b"<|endoftext|>")
