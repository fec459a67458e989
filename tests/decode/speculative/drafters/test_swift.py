"""SWIFT: golden trees, the search in plain Python, and texts that no set of sublayers changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.sampling import Sampling
from decode.speculative.accept import Match, SpeculativeSampling
from decode.speculative.controller import Controller
from decode.speculative.drafters.gaussian_process import upper_bound
from decode.speculative.drafters.side_leaves import CHILDREN, DRAWN_CHILDREN, grow
from decode.speculative.drafters.swift import Swift, run_of
from decode.speculative.loop import SpeculativeMethod, decode
from tests.lib.jitted import as_one_program
from tests.lib.laws import enumerated
from tests.lib.models import random_model
from tests.lib.oracle import Model
from tests.lib.paths import SHARED
from tests.lib.speculation import check_statistics, random_prompts, run, texts
from tests.lib.tiers import more

GOLDEN = SHARED / "goldens" / "swift_tree" / "swift_tree.json"
B, L, W, G = 8, 6, 4, 28
N, MANY = 20_000, 200_000  # texts by default, and of the exhaustive tests
QUICK = dict(num_drafts=4, budget=12, max_children=3, context_window=W, num_remembered=8)


# ---- The tree -----------------------------------------------------------------------------------


def grown(sources, sure, J, table, num_nodes):
    """The tree of one row, whose root is 0, and who is above whom."""

    @as_one_program
    def build(sources, sure, num):
        tree = grow(num * 0, sources, sure, num, table, num_nodes)
        return tree, tree.ancestors(J)

    return jax.device_get(build(sources, np.float32([sure]), np.int32([J])))


@pytest.mark.skipif(not GOLDEN.exists(), reason="further traces lie beside the repository")
@pytest.mark.parametrize("index", range(5))
def test_golden_trees(index):
    case = json.loads(GOLDEN.read_text())["cases"][index]
    J, W = len(case["confidences"]), len(case["mask_rows"])
    table = DRAWN_CHILDREN if case["is_sampled"] else CHILDREN
    sources = 1 + np.arange(10 * J, dtype=np.int32).reshape(1, J, 10)
    tree, above = grown(sources, case["confidences"], J, table, W + 3)
    assert tree.is_valid[0].tolist() == [True] * W + [False] * 3
    assert tree.tokens[0, :W].tolist() == case["token_source"]
    assert tree.depths[0, :W].tolist() == case["position_offsets"]
    above = above[0, :W]
    assert [np.flatnonzero(row).tolist() for row in above] == case["mask_rows"]
    parents = tree.parents[0, :W]
    leaves = [np.flatnonzero(above[v]) for v in range(W) if v not in parents]
    paths = {tuple(v for v in path if v >= 0) for path in case["paths"]}
    assert {tuple(path.tolist()) for path in leaves} == paths


def test_what_does_not_fit_is_left_out():
    """Of 3 + 8 drafts the first five: none without its parent."""
    sources = np.arange(1, 21, dtype=np.int32).reshape(1, 2, 10)
    tree, _ = grown(sources, [0.96, 0.6], 2, CHILDREN, 6)
    assert tree.tokens.tolist() == [[0, 1, 2, 3, 11, 12]]
    assert tree.parents.tolist() == [[-1, 0, 0, 0, 1, 1]] and tree.is_valid.all()


# ---- Texts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(toy_cfg):
    """A target of six layers, prompts, and its greedy texts."""
    cfg = dataclasses.replace(toy_cfg, n_layers=L, mask_token_id=None, eos_token_id=20)
    params, prompts = random_model(1, cfg), random_prompts(cfg, B)
    return cfg, params, prompts, texts(decoded(cfg, params, SpeculativeMethod(), prompts), B)


def decoded(cfg, params, method, prompts, rows=range(B)):
    asked = dict(gen_len=G, prompt_len=13, batch_size=B, seeds=list(rows))
    return run(params, cfg, method, [prompts[b] for b in rows], **asked)


@pytest.mark.exhaustive(every=4)
def test_no_set_of_sublayers_changes_a_text(deep):
    """GREEDY-ID, with sets that are data: one program for all of them, and other thresholds."""
    cfg, params, prompts, expected = deep
    rng, before = np.random.default_rng(0), None
    for floor in (0.0, 0.3, 0.9):
        skipped = np.pad(rng.random((L - 2, 2)) < 0.5, ((1, 1), (0, 0)))
        drafter = Swift(jnp.asarray(skipped), floor=floor, max_trials=0, **QUICK)
        state = decoded(cfg, params, SpeculativeMethod(drafter), prompts)
        assert texts(state, B) == expected
        check_statistics(state, drafter.depth)
        assert np.array_equal(state.drafter.skipped[0], skipped[1:-1].ravel())
        before = before or decode._cache_size()
    assert decode._cache_size() == before
    assert (np.asarray(state.draft_forwards) >= np.asarray(state.num_forwards)).all()


@pytest.mark.exhaustive(every=4)
def test_all_drafts_of_the_whole_model_are_accepted(deep):
    """Card: with nothing left out tau = steps + 1, however long the text is."""
    cfg, params, prompts, expected = deep
    nothing = jnp.zeros((L, 2), bool)
    drafter = Swift(nothing, floor=0.0, max_trials=0, **QUICK)
    state = decoded(cfg, params, SpeculativeMethod(drafter), prompts)
    assert texts(state, B) == expected
    for b, row in enumerate(expected):
        if len(row) == G:  # 28 = 5 * 5 + 3
            assert np.asarray(state.acceptance_histogram)[b].tolist() == [0, 0, 1, 0, 5]


@pytest.mark.exhaustive(every=4)
def test_nothing_is_drafted_that_would_not_fit(deep):
    """Of two or three children each, four depths are more than five nodes: two are read."""
    cfg, params, prompts, expected = deep
    drafter = Swift(floor=0.0, max_trials=0, **QUICK | dict(budget=5))
    state = decoded(cfg, params, SpeculativeMethod(drafter), prompts)
    assert texts(state, B) == expected
    forwards, rounds = np.asarray(state.draft_forwards), np.asarray(state.num_forwards)
    assert (forwards <= 2 * rounds).all() and (forwards > rounds).all()


@pytest.fixture(scope="module")
def searched(deep):
    cfg, params, prompts, _ = deep
    method = SpeculativeMethod(Swift(bayes_interval=3, ratio=0.4, seed=5, **QUICK))
    return method, jax.device_get(decoded(cfg, params, method, prompts))


@pytest.mark.exhaustive(every=4)
def test_the_search_changes_no_text_and_is_the_rows_own(deep, searched):
    cfg, params, prompts, expected = deep
    method, state = searched
    assert texts(state, B) == expected and state.drafter.trials.max() > 5
    for rows in ([3], [6, 1]):
        alone = decoded(cfg, params, method, prompts, rows)
        for name in ("skipped", "best", "trials", "failures", "sets", "scores"):
            found = np.asarray(getattr(alone.drafter, name))[: len(rows)]
            np.testing.assert_array_equal(found, getattr(state.drafter, name)[rows])
        assert np.asarray(alone.step_map)[: len(rows)].tolist() == state.step_map[rows].tolist()


def test_the_best_set_is_kept_and_proposals_have_the_ratios_size(searched):
    state = searched[1].drafter
    for b in range(B):
        num = state.trials[b]
        assert state.rounds[b] >= num
        if num == 0:
            assert state.best[b] == -1
            continue
        num = min(num, QUICK["num_remembered"])
        sets, scores = state.sets[b, :num], state.scores[b, :num]
        assert state.best[b] >= scores.max()
        if state.trials[b] == num:
            first = int(scores.argmax())
            assert state.best[b] == scores[first]
            np.testing.assert_array_equal(state.skipped[b], sets[first])
            assert state.failures[b] == num - 1 - first
            np.testing.assert_array_equal(sets[0], [True, True, False, False] * 2)
            assert (sets[1:].sum(axis=1) == 3).all()  # of 8
            assert len({tuple(x) for x in sets}) > 1


def test_scores_are_those_of_plain_python(deep, searched):
    """One forward of the reduced model over the first W tokens, behind the whole one's prompt."""
    cfg, params, prompts, expected = deep
    state, checked = searched[1].drafter, 0
    whole = Model(params, cfg)
    for b in range(B):
        for trial in range(min(state.trials[b], 3 if state.trials[b] <= 8 else 0)):
            kept = np.asarray(run_of(jnp.asarray(state.sets[b, trial])[None], cfg))[0]
            own = jax.tree.map(np.array, jax.device_get(params))
            own["layers"]["attention"]["o"][~kept[:, 0]] = 0
            own["layers"]["mlp"]["down"][~kept[:, 1]] = 0
            n, text = len(prompts[b]), expected[b][: W + 1]
            _, context = whole.run(prompts[b], range(n), allowed=np.tri(n, dtype=bool))
            allowed = np.concatenate([np.ones((W, n), bool), np.tri(W, dtype=bool)], axis=1)
            model = Model(own, cfg)
            hidden, _ = model.run(text[:W], range(n, n + W), context, allowed)
            matches = model.logits(hidden).argmax(axis=1) == text[1:]
            np.testing.assert_allclose(state.scores[b, trial], matches.mean())
            checked += 1
    assert checked > 3


def test_upper_bounds_are_those_of_a_gaussian_process():
    rng = np.random.default_rng(1)
    sets, proposed = rng.random((7, 10)) < 0.4, rng.random((5, 10)) < 0.4
    scores, known = rng.random(7), np.arange(7) < 5
    found = as_one_program(upper_bound)(sets, np.float32(scores), known, proposed)
    x, y = sets[:5], scores[:5]
    y = (y - y.mean()) / y.std()

    def kernel(a, b):
        r = np.sqrt(5 * (a[:, None] != b[None]).sum(-1)) / (np.sqrt(10) / 2)
        return (1 + r + r**2 / 3) * np.exp(-r)

    inverse = np.linalg.inv(kernel(x, x) + 1e-2 * np.eye(5))
    across = kernel(proposed, x)
    variance = 1 - np.einsum("ci,ij,cj->c", across, inverse, across)
    np.testing.assert_allclose(found, across @ inverse @ y + 2.5 * np.sqrt(variance), rtol=1e-4)


def test_a_search_ends(deep):
    cfg, params, prompts, _ = deep
    for change, most in ((dict(max_trials=2), 2), (dict(max_score=0.0, interval=1), 8)):
        drafter = Swift(**QUICK, **change)
        state = decoded(cfg, params, SpeculativeMethod(drafter), prompts).drafter
        assert np.asarray(state.trials).max() <= most
        if "max_score" in change:  # with the first set that guesses anything
            scores = np.asarray(state.scores)
            trials = np.asarray(state.trials)
            assert all((scores[b, : t - 1] == 0).all() for b, t in enumerate(trials) if 0 < t <= 8)


@pytest.mark.exhaustive
def test_under_a_controller_texts_are_the_same(deep):
    """What the draft writes to the cache stays in the one cache there is, drafted or not."""
    cfg, params, prompts, expected = deep
    drafter = Swift(floor=0.0, **QUICK)
    made = Controller(widths=(1, 4, 13), tolerance=0.1, memory=0.8, savings=1.0, credit=0.1)
    for slope in (0.02, 0.4):
        costs = np.array([1.0, *(1 + slope * np.array([1, 4, 13]))], np.float32)
        method = SpeculativeMethod(drafter, controller=made.replace(costs=costs))
        state = decoded(cfg, params, method, prompts)
        assert texts(state, B) == expected
        assert (np.asarray(state.control.rounds)[:, 1:].sum(axis=1) > 0).any()
    drawn = SpeculativeMethod(
        dataclasses.replace(drafter, is_sampled=True), SpeculativeSampling(), Sampling(1.0),
        controller=made.replace(costs=costs),
    )  # fmt: skip
    with pytest.raises(ValueError, match="is_sampled=True does not go with a controller"):
        drawn.validate(cfg)


# ---- The law of drawn texts ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(toy_cfg):
    return enumerated(dataclasses.replace(toy_cfg, n_layers=4), num_tokens=5, gen_len=3)


DRAWN = Swift(
    num_drafts=2, budget=8, max_children=4, is_sampled=True, floor=0.3, max_trials=0,
    num_remembered=1,
)  # fmt: skip
CASES = [
    (DRAWN, SpeculativeSampling()),
    (DRAWN, Match()),
    (dataclasses.replace(DRAWN, is_sampled=False), Match()),
    (dataclasses.replace(DRAWN, is_sampled=False), SpeculativeSampling()),
    (dataclasses.replace(DRAWN, max_children=1, floor=0.0), SpeculativeSampling()),
    (dataclasses.replace(DRAWN, budget=3), SpeculativeSampling()),
]


@pytest.mark.parametrize(
    ("drafter", "rule", "num"), [(*CASES[0], N), *more(*((*case, MANY) for case in CASES))]
)
def test_drawn_texts_follow_the_targets_law(small, drafter, rule, num):
    far, accepted = small.distance(drafter, rule, num)
    assert far < 4 and accepted > 0.3


@struct.dataclass
class OtherOrder(Swift):
    """Siblings are tested by the draft's probability, not in the order in which they were drawn."""

    def propose(self, cfg, context, state):
        proposal = Swift.propose(self, cfg, context, state)
        tree = proposal.tree
        law = jnp.take_along_axis(tree.probs[:, 0], tree.tokens, axis=1)
        rank = jnp.where(tree.is_valid, -law, 1.0).at[:, 0].set(-2.0)
        tokens = jnp.take_along_axis(tree.tokens, jnp.argsort(rank, axis=1), axis=1)
        return proposal.replace(tree=tree.replace(tokens=tokens))


@pytest.mark.exhaustive
def test_a_wrong_order_is_noticed(small):
    wrong = OtherOrder(
        num_drafts=1, budget=4, max_children=4, is_sampled=True, max_trials=0, num_remembered=1
    )
    assert small.distance(wrong, SpeculativeSampling(), N)[0] > 8


def test_what_cannot_be_is_refused(deep):
    cfg, *_ = deep
    with pytest.raises(ValueError, match=r"skipped has shape \(3, 2\), which must be"):
        Swift(np.zeros((3, 2), bool)).validate(cfg)
    with pytest.raises(ValueError, match="skipped has the first or the last layer"):
        Swift(np.ones((L, 2), bool)).validate(cfg)
    with pytest.raises(ValueError, match="skipped has dtype int64, which must be bool"):
        Swift([[0, 0]] * L).validate(cfg)
    blocks = dataclasses.replace(cfg, block_len=4, shifted_logits=False, mask_token_id=3)
    with pytest.raises(ValueError, match="the model says a token where MASK stands"):
        Swift().validate(blocks)
