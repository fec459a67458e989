"""Two drafters in one: whose tree is judged, and what the other one makes of that."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.sampling import Sampling
from decode.core.streams import fold_in, uniforms
from decode.speculative import loop
from decode.speculative.accept import SpeculativeSampling
from decode.speculative.components import (
    SAM,
    DraftModel,
    DraftModelBeam,
    DraftModelTree,
    DynamicExit,
    Eagle,
    EagleBest,
    Hybrid,
    Hydra,
    Jacobi,
    Lookahead,
    Masks,
    PromptLookup,
    SpeculativeJacobi,
    Swift,
    TokenRecycling,
)
from decode.speculative.controller import Controller
from decode.speculative.drafters.layer_skip import layer_skip
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill
from decode.speculative.state import context_of
from decode.speculative.tree import chain, from_paths
from tests.lib.drafters import Adversary
from tests.lib.speculation import assert_same_law, check_statistics, run, texts
from tests.lib.tiers import more


@struct.dataclass
class Sometimes(Adversary):
    """Sure of its drafts in some rounds, by chance."""

    num_grades = 2

    def propose(self, cfg, context, state):
        grade = uniforms(fold_in(context.key, 13), 1)[:, 0] < 0.5
        made = super().propose(cfg, context, state)
        return made.replace(grade=grade.astype(jnp.int32))


def first_of(truth, num=5, rate=0.8):
    """Long chains, more often right than not, in about half of all rounds."""
    return Sometimes(jnp.asarray(truth), jnp.full(len(truth), rate), shape=chain(num))


@pytest.mark.exhaustive(every=4)
def test_who_drafts_in_each_row(plain, toy_params):
    """The second where the first has nothing, or too little; grades and costs are theirs."""
    cfg, *_ = plain
    first, second = PromptLookup(num_drafts=2), DraftModelTree.example(cfg, toy_params)
    prompts = [[5, 6, 7, 5, 6], [5, 7, 6, 6], [5, 6, 7]]
    found = {}
    for name, drafter in (
        ("first", first), ("second", second),
        *((n, Hybrid(first, second, n)) for n in (0, 1, 2)),
    ):  # fmt: skip
        method = SpeculativeMethod(drafter)
        state = prefill(toy_params, cfg, method, init_state(cfg, method, prompts, gen_len=9))
        made = jax.jit(drafter.propose, static_argnums=0)(
            cfg, context_of(toy_params, method, state), state.drafter
        )
        found[name] = jax.device_get((made.tree, made.grade, made.cost))
    of_first, of_second = found["first"], found["second"]
    assert of_first[1].tolist() == [1, 0, 0] and not of_first[0].is_valid[2, 1:].any()
    assert found[0][1].tolist() == [2, 1, 0] and (found[0][2][:2] == 0).all()
    for threshold, taken in ((0, [True, True, False]), (1, [True, False, False]), (2, [False] * 3)):
        tree, grade, cost = found[threshold]
        for b, is_first in enumerate(taken):
            expected, _, spent = of_first if is_first else of_second
            W = expected.tokens.shape[1]
            assert not tree.is_valid[b, W:].any() and cost[b] == spent[b]
            for name in ("tokens", "parents", "depths", "is_valid"):
                np.testing.assert_array_equal(
                    getattr(tree, name)[b, :W], getattr(expected, name)[b], err_msg=name
                )
            assert (grade[b] > 0) == is_first


SECOND = {
    "model": lambda cfg, params: layer_skip(params, cfg, [1], num_drafts=3),
    "lookahead": Lookahead.example,
    **{kind.__name__: kind.example for kind in (DraftModelTree, Eagle, EagleBest, Hydra, Masks)},
    "recycling": TokenRecycling.example,
    "jacobi": Jacobi.example,
    "sam": SAM.example,
    "exits": DynamicExit.example,
    "speculative_jacobi": lambda cfg, params: SpeculativeJacobi(3),
}


@pytest.mark.parametrize("name", more(*sorted(SECOND)))
@pytest.mark.parametrize("is_controlled", [False, True])
def test_any_two_write_the_plain_text(plain, toy_params, name, is_controlled):
    cfg, prompts, expected, truth = plain
    drafter = Hybrid(first_of(truth), SECOND[name](cfg, toy_params), 1)
    method = SpeculativeMethod(drafter)
    if is_controlled:
        costs = np.linspace(1, 1.1, 1 + len(Controller().widths_of(drafter)), dtype=np.float32)
        method = method.replace(controller=Controller(costs=costs, memory=0.5))
    state = run(toy_params, cfg, method, prompts)
    assert texts(state, 64) == expected
    check_statistics(state, drafter.depth)
    drawn = method.replace(sampling=Sampling(temperature=0.8))
    alone = SpeculativeMethod(sampling=drawn.sampling)
    found = [texts(run(toy_params, cfg, m, prompts), 64) for m in (drawn, alone)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["Eagle", *more("model", "DraftModelTree", "EagleBest", "Hydra")])
def test_rounds_of_the_first_are_made_up_for(plain, toy_params, name):
    """The second then drafts what it drafts when the text so far is a prompt."""
    cfg, prompts, _, truth = plain
    second = SECOND[name](cfg, toy_params)
    method = SpeculativeMethod(Hybrid(first_of(truth[:32], 7, 1.0), second, 1))

    def begin(prompts, num):
        state = init_state(cfg, method, prompts, gen_len=num, prompt_len=40, canvas_len=40)
        return prefill(toy_params, cfg, method, state)

    @jax.jit
    def drafts(state):
        context = context_of(toy_params, method, state).replace(may_pause=True)
        tree = second.propose(cfg, context, state.drafter.second).tree
        return jnp.where(tree.is_valid, tree.tokens, -1)

    state, whose, long = begin(prompts[:32], 40), [], 0
    for _ in range(3):
        before = np.asarray(state.length)
        state = decode(toy_params, cfg, method, state, 1)
        whose.append(np.asarray(state.drafter.is_first))
        long += (np.asarray(state.length) - before > second.depth + 1).sum()
    assert np.mean(whose) > 0.2 and np.mean(whose) < 0.8 and long > 5
    going = ~np.asarray(state.has_stopped)
    tokens, length = np.asarray(state.tokens), np.asarray(state.length)
    again = begin([row[:n].tolist() for row, n in zip(tokens, length, strict=True)], 1)
    assert going.sum() > 10
    found, expected = (np.asarray(drafts(s))[going] for s in (state, again))
    np.testing.assert_array_equal(found, expected)


DRAWN = {
    "chain": lambda params, cfg: DraftModel(
        params, cfg, layers=(0,), num_drafts=2, is_sampled=True
    ),
    "beams": lambda params, cfg: DraftModelBeam(
        params, cfg, layers=(0,), width=2, levels=2, is_sampled=True
    ),
    "iterates": lambda params, cfg: SpeculativeJacobi(3),
}


@pytest.mark.parametrize("name", ["chain", *more("beams", "iterates")])
def test_drawn_drafts_beside_copies_follow_the_targets_law(toy_cfg, toy_params, name):
    prompts = [[3, 1, 2, 9, 3, 1, 2]] * 512
    sampling = Sampling(temperature=1.0, top_k=3)
    second = DRAWN[name](toy_params, toy_cfg)
    drafter = Hybrid(PromptLookup(num_drafts=3), second, 1)
    method = SpeculativeMethod(drafter, SpeculativeSampling(), sampling)
    found = [
        texts(run(toy_params, toy_cfg, some, prompts, gen_len=6, seeds=range(512)), 512)
        for some in (SpeculativeMethod(sampling=sampling), method)
    ]
    assert_same_law(*found)
    assert_same_law(*found, first=2)


def test_pairs_that_make_no_sense_are_refused(toy_cfg, toy_params):
    model = DraftModel.example(toy_cfg, toy_params)
    drawn, copies = model.replace(is_sampled=True), PromptLookup(num_drafts=2)
    tree = TokenRecycling(from_paths([[0], [1]]))
    for first, second, message in (
        (Lookahead(), model, "first=Lookahead reads rows of its own"),
        (drawn, model, "first=DraftModel draws its drafts"),
        (SpeculativeJacobi(3), copies, "first=SpeculativeJacobi draws its drafts"),
        (Hybrid(copies, drawn), copies, "first=Hybrid draws its drafts"),
        (tree, drawn, "beside which first must draft a chain"),
        (tree, Hybrid(copies, drawn), "second=Hybrid draws its drafts, beside which first must"),
        (tree, SpeculativeJacobi(3), "beside which first must draft a chain"),
        (PromptLookup(num_drafts=0), model, "num_drafts=0 must be at least 1"),
        (PromptLookup(num_drafts=1.5), model, "num_drafts=1.5 must be a whole number"),
        (None, model, "first=None must be of class Drafter"),
        (copies, model, r"threshold=7 must be in \[0, 6\], as many grades as"),
    ):
        threshold = 7 if "threshold" in message else 0
        with pytest.raises(ValueError, match=message):
            SpeculativeMethod(Hybrid(first, second, threshold)).validate(toy_cfg)


@pytest.mark.parametrize("order", [1, *more(-1)])
def test_a_part_that_writes_to_the_cache_writes_to_the_only_one(toy_cfg, toy_params, order):
    """A round holds no other copy of it than the part alone does."""
    cfg = dataclasses.replace(toy_cfg, max_seq_len=16384)
    writes = Swift(num_drafts=2, budget=4, max_children=1, max_trials=0)
    copies = PromptLookup(num_drafts=2)
    temporary = []
    for drafter in (writes, Hybrid(*(copies, writes)[::order])):
        method = SpeculativeMethod(drafter)
        state = init_state(cfg, method, [[1, 2, 3]], gen_len=16000)
        step = jax.jit(loop.step, static_argnames="cfg", donate_argnames="state")
        memory = step.lower(toy_params, cfg, method, state).compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
    assert temporary[1] < temporary[0] + state.cache.num_bytes / 2
