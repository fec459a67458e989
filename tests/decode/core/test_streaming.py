"""Texts while they are written: pieces are the text, nothing is taken back or half."""

import dataclasses

import jax
import numpy as np
import pytest

import dlm
from decode import complete, generate
from decode.core.streaming import OPEN, Piece, _overlap, _sure
from decode.diffusion.components import Quota, Remask
from dlm.config import ModelConfig
from dlm.params import init_params
from dlm.tokenizer import byte_tokenizer
from tests.lib.models import spread

SETTINGS = {
    "complete": (complete, dict(gen_len=24, method="prompt_lookup")),
    "generate": (generate, dict(gen_len=24, block_len=8, rule=Quota(2), stopper="filled")),
    "revised": (
        generate,
        dict(gen_len=24, block_len=8, rule=Quota(2), reviser=Remask(2, 2, 0.5)),
    ),
}


@pytest.fixture(scope="module")
def lm():
    tokenizer = byte_tokenizer()
    cfg = ModelConfig(
        d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, max_seq_len=128,
        vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id,
        shifted_logits=True, dtype="float32",
    )  # fmt: skip
    return dlm.LanguageModel(spread(init_params(jax.random.key(0), cfg)), cfg, tokenizer)


def all_of(api, lm, prompt, **options):
    *pieces, last = api.stream_text(lm, prompt, **options)
    assert last.completion is not None and not any(piece.completion for piece in pieces)
    return [*pieces, last]


@pytest.mark.parametrize("name", SETTINGS)
def test_pieces_are_the_text(lm, name):
    api, options = SETTINGS[name]
    whole = (complete.complete if api is complete else generate.generate)(lm, "abcab", **options)
    pieces = all_of(api, lm, "abcab", **options)
    assert "".join(piece.text for piece in pieces) == whole.text
    answer = pieces[-1].completion
    np.testing.assert_array_equal(answer.step_map, whole.step_map)
    assert len(pieces) == answer.num_forwards and sum(bool(piece.text) for piece in pieces) > 2
    # A stop string, of which the first characters come earlier than the others: none gets out.
    stop = whole.text[5:8]
    pieces = all_of(api, lm, "abcab", stop=stop, **options)
    assert "".join(piece.text for piece in pieces) == whole.text[: whole.text.index(stop)]
    assert pieces[-1].completion.finish_reason == "stop"
    # And a token, though what follows it is written too.
    token = int(whole.tokens[4])
    pieces = all_of(api, lm, "abcab", stop_ids=[token], **options)
    expected = whole.tokens[: whole.tokens.tolist().index(token)]
    assert "".join(piece.text for piece in pieces) == lm.tokenizer.decode(expected.tolist())


def test_what_is_ahead_is_shown(lm):
    _, options = SETTINGS["generate"]
    whole = generate.generate(lm, "abcab", **options)
    before, gaps = "", 0
    for step, piece in enumerate(all_of(generate, lm, "abcab", **options)[:-1]):
        before += piece.text
        shown = before + piece.ahead
        gaps += OPEN in piece.ahead
        decided = whole.step_map <= step
        length = int(np.flatnonzero(decided)[-1]) + 1
        ids = whole.canvas[:length]
        parts = [
            lm.tokenizer.decode([t]) if d else OPEN for t, d in zip(ids, decided, strict=False)
        ]
        assert "\N{REPLACEMENT CHARACTER}" in shown + "".join(parts) or shown == "".join(parts)
    assert gaps > 1


def test_what_may_be_revised_is_ahead(lm):
    """Text comes a block at a time, however many rounds that took."""
    _, options = SETTINGS["revised"]
    pieces = all_of(generate, lm, "abcab", **options)
    assert sum(bool(piece.text) for piece in pieces) == 3
    assert sum(bool(piece.ahead) for piece in pieces) > 6


def test_characters_come_whole():
    """Each of their bytes is a token."""
    tokenizer = byte_tokenizer()
    text = "né 🙂🙃!"
    ids = tokenizer.encode(text, plain=True)
    texts = [_sure(tokenizer, ids[:n], ()) for n in range(len(ids) + 1)]
    assert all(text.startswith(some) for some in texts)
    assert [len(some) for some in texts] == [0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6]


def test_how_a_stop_string_may_have_begun():
    assert [_overlap(text, "aab") for text in ("xa", "xaa", "xaab", "b", "")] == [1, 2, 0, 0, 0]


def test_what_cannot_be_streamed_is_refused(lm):
    bare = dataclasses.replace(lm, tokenizer=None)
    with pytest.raises(ValueError, match="no tokenizer that could be read, so there is no text"):
        next(complete.stream_text(bare, [1, 2]))
    assert Piece("a").ahead == ""
