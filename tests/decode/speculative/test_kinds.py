"""Drafts change no greedy text of models with sliding windows, experts or capped logits."""

import dataclasses

import jax
import pytest

from decode.speculative.components import DraftModelTree, Eagle, Lookahead, NoDraft, TokenRecycling
from decode.speculative.drafters.layer_skip import layer_skip
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.tree import TreeShape
from dlm import rope
from dlm.heads.eagle_1 import Eagle1Heads
from tests.lib.kinds import model
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more
from tests.lib.weights import init_from_specs, init_params

TREE = TreeShape((0, 0, 1, 2), (0, 1, 0, 0))  # a root, two drafts, one more below each


def drafters(cfg, params):
    heads = Eagle1Heads()
    own = init_from_specs(jax.random.key(5), heads.specs(cfg), cfg.jnp_dtype)
    return {
        "layer skip": layer_skip(params, cfg, [0, 2], num_drafts=3),
        "tree": DraftModelTree(params, cfg, shape=TREE),
        "recycling": TokenRecycling(),
        "lookahead": Lookahead(ngram=3, window=3),
        "eagle": Eagle(heads.network(cfg, own)),
    }


@pytest.fixture(scope="module", params=["gemma", *more("experts behind a dense layer")])
def case(request):
    """A model with a window much shorter than its texts, and its texts without drafts."""
    cfg, params = model(request.param, shifted_logits=True, sliding_window=4)
    params = params | {"embed": params["embed"] * 4}
    prompts = random_prompts(cfg, 3)
    alone = run(params, cfg, SpeculativeMethod(NoDraft()), prompts, gen_len=16)
    return cfg, params, prompts, texts(alone, 3)


MORE = ("layer skip", "recycling", "lookahead", "eagle")


@pytest.mark.parametrize(
    "name", ["tree", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]
)
def test_drafts_change_no_text(case, name):
    cfg, params, prompts, expected = case
    state = run(params, cfg, SpeculativeMethod(drafters(cfg, params)[name]), prompts, gen_len=16)
    assert texts(state, 3) == expected
    assert len({tuple(text) for text in expected}) == 3 and max(map(len, expected)) == 16


@pytest.mark.exhaustive
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
