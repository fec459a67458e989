"""What a search tries, as it is shown: it is that of `complete`, and every fate is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.complete import complete
from decode.constraints.monitors.python import PythonMonitor
from decode.core.explored import Node
from decode.core.loop import FOREVER
from decode.core.texts import begin_one, read_one
from decode.explored import watch_search
from decode.pictures import FATES, Picture, draw_search
from decode.search.answers import LOOP
from decode.search.components import METHODS, Beam, ConditionalBeam, DiverseBeam, Superposed
from decode.search.contracts import exists
from decode.search.loop import SearchMethod, weighed
from decode.search.pg_td import PGTD
from decode.search.strategies.conditional_beam import Attribute
from tests.lib.tiers import more
from tests.lib.untrained import char_lm


@pytest.fixture(scope="module")
def lm():
    return char_lm()


def paths(nodes):
    """The text up to each node, as its tokens' texts."""
    found = []
    for node in nodes:
        found.append((*(found[node.parent] if node.parent >= 0 else ()), node.text))
    return found


@pytest.mark.parametrize(
    "name", ["beam_4", "momentum", *more(*sorted({*METHODS} - {"beam_4", "momentum"}))]
)
def test_what_won_is_what_complete_finds(lm, name):
    num_return = METHODS[name].strategy.num_results
    best = complete(lm, "abcab", method=name, gen_len=6, num_return=num_return)
    nodes, shown = (
        watch_search(lm, "abcab", method=name, gen_len=6),
        lambda t: lm.tokenizer.decode([t], skip_special_tokens=False),
    )
    every = paths(nodes)
    assert len(set(every)) == len(every)
    assert all(node.parent < i for i, node in enumerate(nodes))
    won = [i for i, node in enumerate(nodes) if node.fate == "won"]
    assert every[won[-1]] == tuple(shown(int(t)) for t in best.canvas) and len(won) == 6
    found = {every[i] for i, node in enumerate(nodes) if node.fate == "found"}
    assert found == {tuple(shown(int(t)) for t in x.canvas) for x in best.others}
    parents = {node.parent for node in nodes}
    assert not any(i in parents for i, node in enumerate(nodes) if node.fate == "dropped")
    assert {"dropped", "won"} <= {node.fate for node in nodes}


def test_scores_are_what_was_chosen_by(lm):
    """Of beams sums, which only fall; of momentum the best of every round was taken."""
    nodes = watch_search(lm, "abcab", method="beam_4", gen_len=4)
    for node in nodes:
        assert node.parent < 0 or node.score < nodes[node.parent].score <= 0
    nodes = watch_search(lm, "abcabcab", method="momentum", gen_len=6)
    for parent in {node.parent for node in nodes}:
        siblings = [node for node in nodes if node.parent == parent]
        assert len(siblings) == 5
        (taken,) = (node for node in siblings if node.fate == "won")
        assert taken.score == max(node.score for node in siblings)
        for node in siblings:
            assert node.score == pytest.approx(
                node.parts["p"] - 0.2 * node.parts["resists"], abs=1e-5
            )


@struct.dataclass
class LikesSome(Attribute):
    """Half of all tokens are less likely to lead to it."""

    def log_prob(self, seen, tokens):
        return -0.7 * (tokens % 2).astype(float)

    def holds(self, texts, has_ended):
        return jnp.ones_like(texts.score, bool)


WEIGHED = {
    "superposed": Superposed.example,
    "beams": lambda cfg: Beam(),
    "groups": lambda cfg: DiverseBeam(),
    "conditional": lambda cfg: ConditionalBeam(LikesSome(), num_tried=10),
}


@pytest.mark.parametrize("name", ["superposed", *more("beams", "groups", "conditional")])
def test_what_is_kept_has_the_value_it_was_weighed_by(lm, name):
    """Of strategies whose scores grow from round to round by what they compare."""
    own = WEIGHED[name](lm.cfg)
    method = SearchMethod(own, num_return=own.num_results)
    state = begin_one(lm, LOOP, method, *read_one(lm, "abcab", 6, 0))
    compared = 0
    for _ in range(5):
        each, source, token = jax.device_get(weighed(lm.params, lm.cfg, method, state))
        state = LOOP.decode(lm.params, lm.cfg, method, state, 1, FOREVER)
        for k, score in enumerate(jax.device_get(state.score[0]).tolist()):
            at = each.tokens[0, source[0, k]] == token[0, k]
            if exists(score) and at.any():
                np.testing.assert_allclose(each.value[0, source[0, k]][at], score, rtol=1e-5)
                compared += 1
        assert (np.diff(each.value[0], axis=1) <= 0).all()  # the best ones, in order
    assert compared > 10


def test_of_a_search_on_the_host_it_is_what_it_reports(lm):
    method = PGTD(reward=lambda prompt, text: text.count("a") / 9, num_rollouts=4)
    nodes = watch_search(lm, "abc", method=method, gen_len=4, seed=2)
    answer = complete(lm, "abc", method=method, gen_len=4, seed=2)
    assert nodes == list(answer.explored.nodes)
    assert "".join(node.text for node in nodes if node.fate == "won") in answer.text
    assert len(draw_search(nodes).axes[0].texts) == 1 + 2 * len(nodes)


def test_what_is_no_search_is_refused_at_once(lm):
    with pytest.raises(ValueError, match="method='prompt_lookup' must be one that searches"):
        watch_search(lm, "abc", method="prompt_lookup")
    with pytest.raises(ValueError, match="no tokenizer that could be read, to show tokens with"):
        watch_search(dataclasses.replace(lm, tokenizer=None), [1], method="beam_4")
    with pytest.raises(ValueError, match="gen_len=0"):
        watch_search(lm, "abc", method="beam_4", gen_len=0)
    with pytest.raises(ValueError, match="constraint must be None or traced: one on the host"):
        watch_search(lm, "abc", method="beam_4", constraint=PythonMonitor())


# ---- Pictures -----------------------------------------------------------------------------------

TREE = [  # of any search: the second child of the first won
    Node(-1, "a", "won", -0.5),
    Node(-1, "b", "dropped", -2.0, {"p": 0.25}),
    Node(0, "c", "kept", -0.9),
    Node(0, "d\n", "won", -0.7),
    Node(2, "e", "dropped"),
    Node(3, "f", "found", -1.0),
    Node(3, "g", "won", -0.8),
]


def chips(picture: Picture):
    """Text -> place and colour of all boxes; what is written in small letters."""
    (axes,) = picture.axes
    boxes = [t for t in axes.texts if t.get_bbox_patch()]
    notes = [t.get_text() for t in axes.texts if not t.get_bbox_patch()]
    colour = lambda t: t.get_bbox_patch().get_facecolor()
    return {t.get_text(): (*t.get_position(), colour(t)) for t in boxes}, notes


def test_a_tree_by_hand():
    from matplotlib.colors import to_rgba

    picture = draw_search(TREE, "a search")
    at, notes = chips(picture)
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert {text: colour for text, (_, _, colour) in at.items()} == {
        text: to_rgba(FATES[node.fate])
        for text, node in zip(["a", "b", "c", "d⏎", "e", "f", "g"], TREE, strict=True)
    }
    x, y = ({text: place[i] for text, place in at.items()} for i in (0, 1))
    assert x["a"] == x["b"] < x["c"] == x["d⏎"] < x["e"] == x["f"] == x["g"]
    assert y["a"] == y["d⏎"] == y["g"] > y["c"] and y["g"] > y["f"] > y["e"]  # what won is on top
    assert notes[0] == "a search" and "-2.00 p 0.25" in notes and notes.count("") == 1
    assert len(set(zip(x.values(), y.values(), strict=True))) == 7  # nothing lies upon another
    (axes,) = picture.axes
    assert len(axes.lines) == 5  # a line to each child


def test_boxes_do_not_overlap(lm):
    """Of one column each has a line of its own, below its parent or beside it."""
    nodes = watch_search(lm, "abcab", method="beam_4", gen_len=5)
    (axes,) = draw_search(nodes).axes
    places = [t.get_position() for t in axes.texts if t.get_bbox_patch()]
    assert len(set(places)) == len(nodes)
    for node, (x, y) in zip(nodes, places, strict=True):
        if node.parent >= 0:
            assert x > places[node.parent][0] and y <= places[node.parent][1]
    assert np.isfinite(places).all()


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node(0, "a")], r"parent=0 of node 0 must be in \[-1, 0\)"),
        ([Node(-1, "a", "lost")], "fate='lost' of node 0 must be in"),
    ],
)
def test_records_that_make_no_tree_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        draw_search(nodes)
