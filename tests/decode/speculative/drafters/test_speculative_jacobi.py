"""Speculative Jacobi decoding: golden steps, initialisations by hand, and the law of the text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.sampling import Sampling
from decode.speculative import accept
from decode.speculative.accept import BlockVerification, SpeculativeSampling, Verdict
from decode.speculative.contracts import Context, Seen
from decode.speculative.controller import Controller
from decode.speculative.drafters import speculative_jacobi
from decode.speculative.drafters.jacobi import Jacobi
from decode.speculative.drafters.speculative_jacobi import SpeculativeJacobi, SpeculativeJacobiState
from decode.speculative.loop import SpeculativeMethod
from decode.speculative.tree import chain
from tests.lib.jitted import as_one_program
from tests.lib.laws import enumerated
from tests.lib.paths import SHARED
from tests.lib.speculation import run, texts
from tests.lib.tiers import more

GOLDEN = SHARED / "goldens" / "sjd_step"
N, MANY = 20_000, 200_000  # texts by default, and of the exhaustive tests


def context_of(text, prompt_len, temperature=1.0):
    """Of one row."""
    return Context(
        params={}, tokens=np.int32([text]), length=np.int32([len(text)]), cache=None,
        key=np.zeros((1, 2), np.uint32), sampling=Sampling(temperature),
        active=np.ones(1, bool), prompt_len=np.int32([prompt_len]),
    )  # fmt: skip


# ---- The public code ----------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.exists(), reason="further traces lie beside the repository")
@pytest.mark.parametrize("index", range(6))
def test_golden_steps(monkeypatch, index):
    """The same coins and draws: what is committed, and what the next round begins with."""
    case = json.loads((GOLDEN / "sjd_step.json").read_text())["cases"][index]
    arrays = np.load(GOLDEN / "sjd_step.npz")
    p, q, u = (arrays[f"{name}_{case['arrays']}"] for name in "pqu")
    J = case["rows"] - 1

    def residual(key, law):
        mass = jnp.cumsum(law[0]) / law.sum()
        return jnp.argmax(mass >= case["resample_uniform"])[None].astype(jnp.int32)

    monkeypatch.setattr(accept, "uniforms", lambda key, num: jnp.asarray(u)[None])
    monkeypatch.setattr(accept, "draw", residual)
    fresh = np.int32([case["fresh_draws"]])
    monkeypatch.setattr(speculative_jacobi, "draw", lambda key, probs: jnp.asarray(fresh))

    @as_one_program
    def round_of(drafts, laws, p, context):
        tree = chain(J).tree(drafts, probs=laws)
        key = jnp.zeros((1, 2), jnp.uint32)
        walk = SpeculativeSampling().walk(Verdict(tree, drafts, p, key), J)
        none = jnp.zeros_like(drafts)
        seen = Seen(none, none, none[:, 0], walk.num_accepted + 1, chosen=none, probs=p)
        state = SpeculativeJacobiState(none[:, :J], jnp.zeros_like(p[:, :J]))
        return walk, SpeculativeJacobi(J).observe(None, context, seen, state)

    drafts = np.int32([case["drafts"]])
    laws = np.concatenate([q[1:], np.zeros_like(q[:1])])[None]  # of the children
    walk, state = jax.device_get(round_of(drafts, laws, p[None], context_of([0], 1)))
    num, bonus = walk.num_accepted[0], walk.bonus[0]
    if num == J:
        bonus = case["fresh_draws"][-1]  # where nothing is left to be rejected
    assert [*case["drafts"][1 : num + 1], bonus] == case["committed"]
    known = state.tokens[0] >= 0
    assert state.tokens[0][known].tolist() == case["kept_as_next_drafts"]
    np.testing.assert_array_equal(state.laws[0][known], p[num + 1 :])


# ---- Where nothing was said yet -----------------------------------------------------------------


def proposed(drafter, context, tokens, laws, cfg):
    state = SpeculativeJacobiState(np.int32([tokens]), laws[None])
    propose = as_one_program(lambda context, state: drafter.propose(cfg, context, state))
    proposal = propose(context, state)
    return proposal.tree.tokens[0, 1:].tolist(), np.asarray(proposal.tree.probs[0, :-1])


def test_initialisations_of_a_grid(toy_cfg):
    """Rows of four, of which the first begins behind one token; the root is the grid's sixth.

    text    9 8 | 7 | 1 2 3 20
                      4 5 . .
                      . . . .
    """
    context = context_of([9, 8, 7, 1, 2, 3, 20, 4, 5], 2)
    laws = np.zeros((7, toy_cfg.vocab_size), np.float32)
    laws[0, 11] = 1.0
    make = lambda how, **other: SpeculativeJacobi(
        7, how, row_len=4, grid_start=1, first_id=12, num_ids=3, **other
    )
    known = [13, *[-1] * 6]
    image = {12, 13, 14}
    found, law = proposed(make("repeat_horizon"), context, known, laws, toy_cfg)
    assert found[:2] == [13, 13] and len(set(found[2:6])) == 1 and set(found[2:]) <= image
    np.testing.assert_array_equal(law[1:], np.eye(toy_cfg.vocab_size)[found[1:]])
    np.testing.assert_array_equal(law[0], laws[0])
    found, _ = proposed(make("repeat_horizon"), context, [13, 5, *[-1] * 5], laws, toy_cfg)
    assert found[:2] == [13, 5] and set(found[2:]) <= image
    found, _ = proposed(make("sample_horizon"), context, known, laws, toy_cfg)
    assert found[:2] == [13, 11] and set(found[2:]) <= image
    found, _ = proposed(make("repeat_horizon", row_end=20), context, known, laws, toy_cfg)
    assert found[:2] == [13, 20] and found[5] == 20
    found, _ = proposed(make("repeat_vertical"), context, [-1] * 7, laws, toy_cfg)
    assert found == [3, 20, 4, 5, 3, 20, 4]
    found, _ = proposed(make("random"), context, [-1] * 7, laws, toy_cfg)
    assert set(found) <= image and len(set(found)) > 1
    first = context_of([9, 8, 7, 1], 2)  # nothing is above the first row
    found, _ = proposed(make("repeat_vertical"), first, [-1] * 7, laws, toy_cfg)
    assert set(found[:3]) <= image and found[3] == 1


def test_text_is_one_row(toy_cfg):
    """So the newest guess is repeated, at first the root."""
    laws = np.zeros((3, toy_cfg.vocab_size), np.float32)
    drafter, context = SpeculativeJacobi(3), context_of([4, 7], 2)
    assert proposed(drafter, context, [-1] * 3, laws, toy_cfg)[0] == [7, 7, 7]
    assert proposed(drafter, context, [5, 6, -1], laws, toy_cfg)[0] == [5, 6, 6]


def test_guesses_that_were_not_judged_stay():
    """Of three guesses one is judged, and the token behind it was written, too."""
    drafter, context = SpeculativeJacobi(3), context_of([4, 7], 2, temperature=None)
    laws = np.eye(9, dtype=np.float32)
    state = SpeculativeJacobiState(np.int32([[3, 4, 5]]), laws[None, 3:6])
    none, said = np.zeros((1, 4), np.int32), np.int32([[3, 8]])
    observe = as_one_program(lambda seen, state: drafter.observe(None, context, seen, state))
    for count, tokens in ((2, [5, -1, -1]), (1, [8, 5, -1])):
        seen = Seen(none, none, none[:, 0], np.int32([count]), chosen=said, probs=laws[said])
        found = observe(seen, state)
        assert found.tokens.tolist() == [tokens]
        known = [token for token in tokens if token >= 0]
        np.testing.assert_array_equal(np.asarray(found.laws)[0, : len(known)], laws[known])


def test_what_cannot_be_is_refused(toy_cfg):
    with pytest.raises(ValueError, match="num_ids=5 must be at most 4, the tokens from first_id"):
        SpeculativeJacobi(first_id=20, num_ids=5).validate(toy_cfg)
    with pytest.raises(ValueError, match="row_len=0 must be at least 1 with init_by=repeat_vert"):
        SpeculativeJacobi(init_by="repeat_vertical").validate(toy_cfg)


# ---- The text -----------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
def test_with_temperature_none_it_is_jacobi(plain, toy_params):
    """Card: T = 0 equals Jacobi; round for round, whichever rule judges."""
    cfg, prompts, rows, _ = plain
    states = [
        run(toy_params, cfg, SpeculativeMethod(drafter, rule, Sampling(None)), prompts[:16])
        for drafter, rule in (
            (Jacobi(3), SpeculativeSampling()),
            (SpeculativeJacobi(3), SpeculativeSampling()),
        )
    ]
    assert texts(states[0], 16) == texts(states[1], 16) == rows[:16]
    np.testing.assert_array_equal(states[0].step_map, states[1].step_map)
    np.testing.assert_array_equal(*(state.acceptance_histogram for state in states))


@pytest.mark.exhaustive(every=4)
def test_a_text_whose_drafts_must_match_is_drawn_as_without(plain, toy_params):
    """The laws that are kept for drafts change no random number."""
    cfg, prompts, *_ = plain
    sampling = Sampling(temperature=0.8)
    alone, beside = (
        texts(run(toy_params, cfg, method, prompts[:8]), 8)
        for method in (
            SpeculativeMethod(sampling=sampling),
            SpeculativeMethod(SpeculativeJacobi(3), sampling=sampling),
        )
    )
    assert alone == beside


@pytest.fixture(scope="module")
def small(toy_cfg):
    return enumerated(toy_cfg, num_tokens=5, gen_len=4)


CASES = [
    (SpeculativeJacobi(2), SpeculativeSampling()),
    (SpeculativeJacobi(1, "random"), SpeculativeSampling()),
    (SpeculativeJacobi(3, "random"), SpeculativeSampling()),
    (SpeculativeJacobi(3, "sample_horizon", row_len=2), SpeculativeSampling()),
    (SpeculativeJacobi(3, "repeat_vertical", row_len=2, row_end=3), SpeculativeSampling()),
    (SpeculativeJacobi(2), BlockVerification()),
]


@pytest.mark.parametrize(
    ("drafter", "rule", "num"),
    [(*CASES[0], N), *more(*((*case, MANY) for case in CASES))],
)
def test_the_text_follows_the_targets_law(small, drafter, rule, num):
    """Card: CHI2, with the dependency over two rounds and more."""
    far, accepted = small.distance(drafter, rule, num)
    assert far < 4 and accepted > 0.5


@pytest.mark.parametrize("num", more(N))
def test_so_it_does_under_a_controller(small, num):
    """Of three guesses one, all or none is judged; those that are not keep their laws."""
    costs = np.array([1.0, 1.05, 1.1, 1.3], np.float32)
    made = Controller(widths=(1, 2, 4), costs=costs, memory=0.5, credit=0.2, tolerance=0.05)
    far, accepted = small.distance(
        SpeculativeJacobi(3), SpeculativeSampling(), num, controller=made
    )
    assert far < 4 and accepted > 0.1


@struct.dataclass
class OldLaws(SpeculativeJacobi):
    """Guesses are new, but their laws those of the round before."""

    def observe(self, cfg, context, seen, state):
        new = SpeculativeJacobi.observe(self, cfg, context, seen, state)
        index = jnp.minimum(seen.count[:, None] + jnp.arange(self.num_guesses)[None], 1)
        old = jnp.take_along_axis(state.laws, index[..., None], axis=1)
        return new.replace(laws=old)


@struct.dataclass
class OldGuesses(SpeculativeJacobi):
    """Laws are new, but guesses those of the round before."""

    def observe(self, cfg, context, seen, state):
        new = SpeculativeJacobi.observe(self, cfg, context, seen, state)
        index = seen.count[:, None] + jnp.arange(self.num_guesses)[None]
        old = jnp.take_along_axis(state.tokens, jnp.minimum(index, 1), axis=1)
        return new.replace(tokens=jnp.where(index < self.num_guesses, old, new.tokens))


@pytest.mark.parametrize("wrong", [OldLaws(2), OldGuesses(2)], ids=["old laws", "old guesses"])
@pytest.mark.exhaustive
def test_wrong_variants_are_noticed(small, wrong):
    assert small.distance(wrong, SpeculativeSampling(), N)[0] > 8
