"""Texts while they are written: pieces are the text, nothing is taken back or half."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from decode import complete, generate
from decode.core.results import to_text
from decode.core.streaming import OPEN, Piece, _overlap, _sure
from decode.core.texts import Asked
from decode.diffusion.components import FixedBlocks, Keep, Quota, Remask, TokenEdit
from decode.diffusion.loop import DiffusionMethod, init_state, stream
from dlm.sharding import make_mesh
from dlm.tokenizer import byte_tokenizer
from tests.lib.untrained import byte_lm

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
    return byte_lm()


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
    """With a reviser only whole blocks are certain, without one what stands before a gap."""
    revised = DiffusionMethod(FixedBlocks(8), rule=Quota(2), reviser=TokenEdit(0.3, 3))
    lengths = []
    for method in (revised, revised.replace(reviser=Keep())):
        state = init_state(lm.cfg, method, [[97, 98, 99]], gen_len=24)
        states = stream(lm.params, lm.cfg, method, state)
        lengths.append({len(generate.LOOP.written(x, method)[0][0]) for x in states})
    assert lengths[0] <= {0, 8, 16, 24} and len(lengths[1] - {0, 8, 16, 24}) > 2


def test_characters_come_whole():
    """Each of their bytes is a token."""
    tokenizer = byte_tokenizer()
    text = "né 🙂🙃!"
    ids = tokenizer.encode(text, plain=True)
    texts = [_sure(tokenizer, ids[:n], ()) for n in range(len(ids) + 1)]
    assert all(text.startswith(some) for some in texts)
    assert [len(some) for some in texts] == [0, 1, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6]
    start = tokenizer.bos_token_id  # which no text shows
    assert _sure(tokenizer, [97, *"🙂".encode()[:2], start], ()) == "a"


@pytest.mark.parametrize("stops", [(), ("you .",), ("n't c",)])
def test_spaces_that_are_taken_out_again_are_not_given_out(stops):
    tokenizer = dataclasses.replace(byte_tokenizer(), cleans_up=True)
    ids = list(b"so we do n't care , it 's you .")
    whole, _, _ = to_text(tokenizer, np.array(ids), stops)
    texts = [_sure(tokenizer, ids[:n], stops) for n in range(len(ids) + 1)]
    found = [text for text in texts if text is not None]
    assert all(whole.startswith(text) for text in found) and len(set(found)) > 3


@pytest.mark.parametrize(("text", "stop"), [("abéz", "béz"), ("a🙂b", "a🙂b"), ("ab🙂", "b🙂")])
def test_a_stop_string_may_go_on_with_half_a_character(text, stop):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, plain=True)
    *texts, last = [_sure(tokenizer, ids[:n], [stop]) for n in range(len(ids) + 1)]
    assert last is None and texts == sorted(texts) and texts[-1] == text.removesuffix(stop)


def test_half_a_character_is_no_stop_string_before_the_text_has_ended():
    tokenizer = byte_tokenizer()
    assert _sure(tokenizer, [97, 0xF0, 0x9F], ["\ufffd"]) == "a"
    assert _sure(tokenizer, [97, 0xF0, 0x9F, 98], ["\ufffd"]) is None
    asked = Asked(types.SimpleNamespace(tokenizer=tokenizer), [], [], [], ["\ufffd"])
    found = [asked._has_stop(np.array(ids)) for ids in ([97, 0xF0, 0x9F], [97, 0xF0, 98])]
    assert found == [False, True]


def test_how_a_stop_string_may_have_begun():
    assert [_overlap(text, "aab") for text in ("xa", "xaa", "xaab", "b", "")] == [1, 2, 0, 0, 0]


def test_whoever_takes_the_pieces_is_in_no_mesh(lm):
    _, options = SETTINGS["generate"]
    mesh = make_mesh(data=2)
    split = dataclasses.replace(lm, params=jax.device_put(lm.params), mesh=mesh)
    pieces = []
    for piece in generate.stream_text(split, "abcab", **options):
        assert jax.sharding.get_abstract_mesh().empty
        pieces.append(piece.text)
    assert "".join(pieces) == generate.generate(lm, "abcab", **options).text


@pytest.mark.parametrize("api", [complete, generate])
def test_arguments_that_do_not_exist_are_refused_at_once(lm, api):
    """Also those of neighbours."""
    for call, name in (("stream_text", "num_return"), ("as_finished", "max_tokens"),
                       ("warm_up", "metod"), ("stream_text", "infill")):  # fmt: skip
        message = rf"^{call}\(\) got an unexpected keyword argument '{name}'"
        with pytest.raises(TypeError, match=message):
            getattr(api, call)(lm, "abc", **{name: 1})


def test_what_cannot_be_streamed_is_refused(lm):
    bare = dataclasses.replace(lm, tokenizer=None)
    with pytest.raises(ValueError, match="no tokenizer that could be read, so there is no text"):
        complete.stream_text(bare, [1, 2])
    with pytest.raises(ValueError, match="gen_len=0 of prompt 0"):  # before anything is asked for
        complete.stream_text(lm, "abc", gen_len=0)
    assert Piece("a").ahead == ""
