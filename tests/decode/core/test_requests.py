"""What may stand for a prompt, and what is said of the rest."""

import numpy as np
import pytest

from decode.core.requests import encode, is_single
from decode.core.results import read_stops
from dlm.lm import LanguageModel
from dlm.tokenizer import byte_tokenizer


@pytest.fixture
def lm(toy_cfg):
    return LanguageModel({}, toy_cfg, byte_tokenizer())


def test_texts_and_token_ids(lm):
    assert encode(lm, "Hi") == [72, 105] and encode(lm, np.str_("Hi")) == [72, 105]
    for ids in ([1, 2], (1, 2), np.array([1, 2]), [np.int64(1), np.uint8(2)], range(1, 3)):
        assert encode(lm, ids) == [1, 2] and is_single(ids)
    assert not is_single([[1, 2]]) and not is_single(["a"]) and not is_single([])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"Hi", "a prompt is a bytes; it must be a string or a list of token ids$"),
        ({"role": "user", "content": "Hi"}, "a dict; .*; messages go through .*chat_template$"),
        (3.0, "a prompt is a float"),
        (None, "a prompt is a NoneType"),
        ([1.5, 2], "a prompt has 1.5 among its token ids, which must be integers"),
        (["a", "b"], "a prompt has 'a' among"),
        ([True], "a prompt has True among"),
        (np.array([0.5]), "0.5.* among its token ids"),
        ([None], "a prompt has None among"),
        ([{"role": "user"}], "a prompt has {.*}.* integers; messages go through .*chat_template$"),
        ([[1]], r"a prompt has \[1\] among"),
    ],
)
def test_other_things_are_no_prompts(lm, prompt, message):
    with pytest.raises(TypeError, match=message):
        encode(lm, prompt)


def test_bytes_are_not_taken_for_token_ids():
    for prompts in (b"Hi", 3, None, {"role": "user"}, iter([1])):
        with pytest.raises(TypeError, match="it must be a string, a list of token ids, or a list"):
            is_single(prompts)


def test_stops_are_strings(lm):
    assert read_stops(lm, "a") == ["a"] and read_stops(lm, ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="stop has 3, which is no string: token ids go into stop_"):
        read_stops(lm, ["a", 3])
    with pytest.raises(ValueError, match="stop has an empty string"):
        read_stops(lm, "")
