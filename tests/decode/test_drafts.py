"""Rounds of draft and verify as they are shown: they are those in which the text is written."""

import numpy as np
import pytest

from decode.complete import complete
from decode.drafts import watch_drafts
from decode.speculative.accept import SpeculativeSampling
from decode.speculative.controller import Controller
from decode.speculative.drafters.draft_model import DraftModelTree
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.pearl import Pearl
from decode.speculative.tree import from_paths
from tests.lib.tiers import more
from tests.lib.untrained import byte_lm

PROMPT = "to be or not to be"
SHAPE = from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [1, 0, 0]])


@pytest.fixture(scope="module")
def lm():
    return byte_lm()


def drawn(lm):
    """Trees of which siblings may be equal, and whose tokens are drawn."""
    drafter = DraftModelTree(lm.params, lm.cfg, shape=SHAPE, is_sampled=True)
    return dict(drafter=drafter, acceptance=SpeculativeSampling(), temperature=1.5, seed=3)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "choices",
    [
        lambda lm: dict(drafter=TokenRecycling(SHAPE)),
        *more(lambda lm: dict(drafter=PromptLookup()), drawn, lambda lm: {}),
    ],
)
def test_rounds_are_those_of_complete(lm, choices):
    answer = complete(lm, PROMPT, gen_len=40, **choices(lm))
    rounds = list(watch_drafts(lm, PROMPT, gen_len=40, **choices(lm)))
    assert np.concatenate([round.written for round in rounds]).tolist() == answer.canvas.tolist()
    steps = np.repeat([r.step for r in rounds], [len(r.written) for r in rounds])
    assert steps.tolist() == answer.step_map.tolist()
    *others, last_round = [round.num_accepted for round in rounds]
    counts = answer.acceptance_histogram - np.bincount(
        others, minlength=len(answer.acceptance_histogram)
    )
    assert counts.sum() == counts.max() == 1 and counts.argmax() >= last_round  # cut at `gen_len`
    last = lm.tokenizer.encode(PROMPT, whole=True)[-1]
    for round in rounds:
        assert round.tokens[0] == last and round.parents[0] == -1
        assert (round.parents[1:] < np.arange(1, len(round.tokens))).all()
        assert (round.parents[1:] >= 0).all()
        assert round.path[0] == 0
        assert round.parents[[*round.path[1:]]].tolist() == [*round.path[:-1]]
        n = round.num_accepted
        assert round.tokens[[*round.path[1:]]].tolist() == round.written[:n].tolist()
        assert n <= round.num_drafts and n <= len(round.written) <= n + 1
        last = round.written[-1]


def test_nodes_that_do_not_exist_are_not_shown(lm):
    """Nothing was seen yet: the first trees of token recycling have holes."""
    rounds = list(watch_drafts(lm, PROMPT, gen_len=40, drafter=TokenRecycling(SHAPE)))
    assert len({len(round.tokens) for round in rounds}) > 1
    assert max(len(round.tokens) for round in rounds) <= SHAPE.num_nodes
    assert any(round.num_accepted > 1 for round in rounds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(controller=Controller()), "controller=.* must be None"),
        (dict(gen_len=0), "gen_len=0"),
        (dict(method="prompt_lokup"), "there is no method 'prompt_lokup'"),
        (dict(drafter=PromptLookup(num_drafts=0)), "num_drafts=0 must be at least 1"),
        (dict(method="beam_4"), "method=SearchMethod must be a SpeculativeMethod"),
        (dict(method=Pearl(PromptLookup())), "method=Pearl must be a SpeculativeMethod"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(lm, options, message):
    with pytest.raises(ValueError, match=message):
        watch_drafts(lm, PROMPT, **options)
