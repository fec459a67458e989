"""Pictures: what they say, where, and in which colour."""

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_hex

from decode.core.results import Completion
from decode.drafts import DraftRound
from decode.pictures import KEPT, LEFT, OWN, Picture, draw_drafts, draw_steps
from decode.view import Answer
from dlm.tokenizer import word_tokenizer

WORDS = ["a", "bc", "d", "\n", " ", "$x$"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


def ids(tokenizer, text):
    return np.array([tokenizer.encode(word)[0] for word in text])


def written(picture: Picture) -> list[tuple[str, float, float, str]]:
    """Text, place and colour (of the box) of everything that is written."""
    (axes,) = picture.axes
    return [
        (t.get_text(), *t.get_position(), to_hex(t.get_bbox_patch().get_facecolor()))
        if t.get_bbox_patch()
        else (t.get_text(), *t.get_position(), "")
        for t in axes.texts
    ]


def chips(picture: Picture) -> list[tuple[str, float, float, str]]:
    return [text for text in written(picture) if text[3]]


def answer(tokenizer, text, steps, reason="eos"):
    canvas = ids(tokenizer, text)
    n = len(canvas) - (reason == "eos")
    completion = Completion(
        text="", tokens=canvas[:n], num_forwards=3, tokens_per_forward=n / 3, finish_reason=reason,
        canvas=np.append(canvas, canvas[:1]), step_map=np.array([*steps, 7]),
        confidence=np.ones(len(steps) + 1), log_prob=np.zeros(len(steps) + 1),
    )  # fmt: skip
    return Answer("prompt", "method", completion, True)


def test_each_token_has_its_step_up_to_the_end_of_the_text(tokenizer):
    picture = draw_steps(
        [answer(tokenizer, ["a", "bc", "\n", " ", "d"], [2, 0, 1, -1, 2])], tokenizer
    )
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert [text for text, *_ in chips(picture)] == ["a", "bc", "⏎", "d"]  # -1: never decided
    said = [text for text, *_ in written(picture)]
    assert said[0] == "method ✓    3 forwards, 1.3 tokens per forward"
    assert [text for text in said if text.isdecimal()] == ["2", "0", "1", "2"]
    colors = [color for *_, color in chips(picture)]
    assert colors[0] == colors[3] != colors[1] != colors[2]


def test_of_a_filled_prompt_the_canvas_is_drawn(tokenizer):
    """Its `tokens` are the whole text, of which the canvas is the end."""
    filled = answer(tokenizer, ["a", "bc", "d"], [2, 0, 1], reason="length")
    whole = np.concatenate([ids(tokenizer, ["d", "d", "d"]), filled.completion.tokens])
    longer = dataclasses.replace(filled.completion, tokens=whole)
    picture = draw_steps([dataclasses.replace(filled, completion=longer)], tokenizer)
    assert [text for text, *_ in chips(picture)] == ["a", "bc", "d"]


def test_long_answers_are_wrapped(tokenizer):
    text = ["bc"] * 20
    picture = draw_steps([answer(tokenizer, text, range(20), "length")] * 2, tokenizer, width=30)
    rows = {y for _, _, y, _ in chips(picture)}
    assert len(chips(picture)) == 40 and len(rows) == 6  # seven in a line
    assert all(x + len("bc") < 30 for _, x, *_ in chips(picture))
    width, height = picture.get_size_inches()
    (axes,) = picture.axes
    assert axes.get_ylim()[0] < min(rows) and width < height * 3


def test_a_tree_by_hand(tokenizer):
    """Round: a, under which bc (with d and $x$ under it) and d were drafted; bc, $x$ were kept."""
    tree = DraftRound(
        step=3,
        tokens=ids(tokenizer, ["a", "bc", "d", "d", "$x$"]),
        parents=np.array([-1, 0, 0, 1, 1]),
        path=(0, 1, 4),
        written=ids(tokenizer, ["bc", "$x$", " "]),
    )
    every = chips(draw_drafts([tree], tokenizer))
    shown = {(text, color): (x, y) for text, x, y, color in every if color != LEFT}
    root, first, last = shown["a", KEPT], shown["bc", KEPT], shown["$x$", KEPT]
    assert root[1] == first[1] and root[0] < first[0] < last[0] < shown["␣", OWN][0]
    assert last[1] == shown["␣", OWN][1] < first[1]  # the second child has a line of its own
    lowest = min(y for _, _, y, _ in every)
    left = [(x, y) for text, x, y, color in every if (text, color) == ("d", LEFT)]
    assert sorted(left) == [(first[0], lowest), (last[0], first[1])] and lowest < last[1]
    assert len(every) == 6


def test_rounds_without_drafts_and_texts_that_end(tokenizer):
    alone = DraftRound(4, ids(tokenizer, "a"), np.array([-1]), (0,), ids(tokenizer, "d"))
    ended = DraftRound(7, ids(tokenizer, "ad"), np.array([-1, 0]), (0, 1), ids(tokenizer, "d"))
    picture = draw_drafts([alone, ended], tokenizer)
    assert [(text, color) for text, _, _, color in chips(picture)] == [
        ("a", KEPT), ("d", OWN), ("a", KEPT), ("d", KEPT)
    ]  # fmt: skip
    titles = [text for text, *_ in written(picture) if text.startswith("round")]
    assert titles == ["round 4: 0 of 0 drafts kept", "round 7: 1 of 1 drafts kept"]
