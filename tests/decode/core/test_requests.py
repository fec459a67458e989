"""What may stand for a prompt, and what is said of the rest."""

import numpy as np
import pytest

from decode.core.requests import (
    encode,
    is_single,
    per_prompt,
    per_prompt_seeds,
    piece_len,
    read_stop_ids,
    repeat_requests,
)
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
    for prompts in (b"Hi", 3, None, {"role": "user"}, iter([1]), np.array(3)):
        with pytest.raises(TypeError, match="it must be a string, a list of token ids, or a list"):
            is_single(prompts)


def test_stops_are_strings(lm):
    assert read_stops(lm, "a") == ["a"] and read_stops(lm, ("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="stop has 3, which is no string: token ids go into stop_"):
        read_stops(lm, ["a", 3])
    with pytest.raises(ValueError, match="stop has an empty string"):
        read_stops(lm, "")
    for stop in (None, 5, {"a"}):
        with pytest.raises(ValueError, match="must be a string or a list of strings"):
            read_stops(lm, stop)


@pytest.mark.parametrize("one", [3, np.int64(3), np.uint8(3), np.array(3)])
def test_numbers_are_whole_whoever_counted(one):
    assert per_prompt("gen_len", one, 2) == [3, 3] == per_prompt("gen_len", [one, 3], 2)
    assert per_prompt_seeds(one, 2) == [3, 4] and read_stop_ids([one]).tolist() == [3]
    _, lengths, seeds = repeat_requests([[1], [2]], one, np.array([3, -1], np.int32), 2)
    assert lengths == [3] * 4 and seeds == [3, 3 + 2**32, -1, 2**32 - 1]
    assert all(type(number) is int for number in lengths + seeds)


@pytest.mark.parametrize("wrong", [3.0, "3", None, True, np.float32(3), [3], {3}])
def test_other_things_are_no_numbers(wrong):
    for found in (
        lambda: per_prompt("gen_len", [wrong], 1),
        lambda: per_prompt_seeds([wrong], 1),
        lambda: read_stop_ids([wrong]),
    ):
        with pytest.raises(ValueError, match=r"an entry of .* must be a whole number"):
            found()
    if wrong != [3]:
        with pytest.raises(ValueError, match=r"gen_len=.* must be a whole number"):
            per_prompt("gen_len", wrong, 1)
        with pytest.raises(ValueError, match="must be a list of token ids"):
            read_stop_ids(wrong)


@pytest.mark.parametrize("most", [3, 256, 512])
def test_prompts_are_read_in_few_pieces_of_one_length(most):
    for num in range(1, 2100):
        piece = piece_len(num, most)
        pieces = -(-num // piece)
        assert pieces == -(-num // most) and piece <= min(most, num)
        assert pieces * piece - num < 8 * pieces  # hardly anything is read that is not there
