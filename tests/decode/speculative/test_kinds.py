"""Drafts change no greedy text of models with sliding windows, experts or capped logits."""

import dataclasses

import jax
import pytest

from decode.complete import complete
from decode.speculative.components import DRAFTERS, DraftModelTree, NoDraft
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.tree import TreeShape
from dlm import rope
from dlm.lm import LanguageModel
from tests.lib.kinds import model
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more
from tests.lib.weights import init_params

TREE = TreeShape((0, 0, 1, 2), (0, 1, 0, 0))  # a root, two drafts, one more below each


@pytest.fixture(scope="module", params=["gemma", *more("experts behind a dense layer")])
def case(request):
    """A model with a window much shorter than its texts, and its texts without drafts."""
    cfg, params = model(request.param, shifted_logits=True, sliding_window=4)
    params = params | {"embed": params["embed"] * 4}
    prompts = random_prompts(cfg, 3)
    alone = run(params, cfg, SpeculativeMethod(NoDraft()), prompts, gen_len=16)
    return cfg, params, prompts, texts(alone, 3)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "kind", [DraftModelTree, *more(*(k for k in DRAFTERS if k is not DraftModelTree))]
)
def test_drafts_change_no_text(case, kind):
    cfg, params, prompts, expected = case
    method = SpeculativeMethod(kind.example(cfg, params))
    state = run(params, cfg, method, prompts, gen_len=16)
    assert texts(state, 3) == expected
    assert len({tuple(text) for text in expected}) == 3 and max(map(len, expected)) == 16


@pytest.mark.parametrize("kind", more(*DRAFTERS))
def test_rows_that_are_replaced_write_the_same(case, kind):
    cfg, params, prompts, expected = case
    lm = LanguageModel(params, cfg, None)
    answers = complete(lm, prompts, drafter=kind.example(cfg, params), gen_len=16, batch_size=2)
    assert [answer.canvas.tolist() for answer in answers] == expected


@pytest.mark.exhaustive(every=4)
def test_frequencies_go_by_the_length_of_the_row():
    """Rows of other lengths do not matter, nor does how far a text has come."""
    scaling = rope.LongRope(
        short=(1.0,) * 8, long=(4.0,) * 8, original_max_seq_len=16, attention=1.1
    )
    cfg, _ = model("growing queries", shifted_logits=True, rope_scaling=scaling)
    cfg = dataclasses.replace(cfg, query_growth=None)
    params = init_params(jax.random.key(0), cfg)
    prompts = random_prompts(cfg, 2, seed=3)
    method = SpeculativeMethod(DraftModelTree(params, cfg, shape=TREE))
    both = texts(run(params, cfg, method, prompts, gen_len=[3, 20]), 2)
    short = dataclasses.replace(cfg, rope_scaling=dataclasses.replace(scaling, long=scaling.short))
    long = dataclasses.replace(cfg, rope_scaling=dataclasses.replace(scaling, short=scaling.long))
    assert len(prompts[0]) + 3 <= 16 < len(prompts[1]) + 20
    plain = SpeculativeMethod(NoDraft())
    assert both[0] == texts(run(params, short, plain, prompts[:1], gen_len=3), 1)[0]
    assert both[1] == texts(run(params, long, plain, prompts[1:], gen_len=20), 1)[0]
    assert both[1] != texts(run(params, short, plain, prompts[1:], gen_len=20), 1)[0]
