"""What a controller learns, chooses and spends; that nothing it chooses changes a text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.core.loop import FOREVER
from decode.core.sampling import Sampling
from decode.speculative import loop
from decode.speculative.accept import SpeculativeSampling, Typical, Walk
from decode.speculative.components import (
    DRAFTERS,
    DFlash,
    DraftModel,
    DraftModelBest,
    DraftModelTree,
    Eagle,
    EagleBest,
    Hybrid,
    Hydra,
    NoDraft,
    PromptLookup,
    Swift,
    TokenRecycling,
)
from decode.speculative.contracts import ExtraRows, Proposal
from decode.speculative.controller import Controller
from decode.speculative.drafters.smaller_model import SmallerModel
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill
from decode.speculative.state import context_of
from decode.speculative.tree import DraftTree, TreeShape, chain, from_paths
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from tests.lib.docs import check_refusals, check_wrong_kinds
from tests.lib.drafters import Adversary
from tests.lib.speculation import (
    assert_same_law,
    check_statistics,
    run,
    texts,
)
from tests.lib.tiers import more, often

ACTIVE, NONE = np.ones(1, bool), np.zeros(1, np.int32)
TREE = from_paths([[0], [1], [2], [0, 0], [0, 1], [1, 0]])
# A round that drafts takes hardly longer than one that does not, so much is tried.
EAGER = {"tolerance": 0.1, "memory": 0.8, "savings": 1.0, "credit": 0.1}
HALF = {"prior": 0.5, "surest": 0.5, "weight": 1.0}


def controller(drafter, slope=0.05, **options):
    """With costs that grow by `slope` per node."""
    made = Controller(**options)
    widths = np.array(made.widths_of(drafter))
    return made.replace(costs=np.array([1.0, *(1 + slope * widths)], np.float32))


@jax.jit
def reach_of(made, drafter, state, tree, grade=None):
    return made.reach(state, Proposal(tree, NONE, (), grade=grade), drafter.depth)


@jax.jit
def choice_of(made, drafter, state, tree, active):
    return made.choose(drafter, state, Proposal(tree, NONE, ()), active)


@jax.jit
def learned(made, drafter, state, choice, tree, nodes, walk, active, grade=None):
    proposal = Proposal(tree, NONE, (), grade=grade)
    return made.learn(drafter, state, choice, proposal, nodes, walk, active)


def empty(drafter, made, num=1):
    return jax.tree.map(np.array, made.init(drafter, num))


def seen(state, hits, tries):
    """The same in all cells, or as an array that fits them."""
    return state.replace(
        hits=np.broadcast_to(np.float32(hits), state.hits.shape),
        tries=np.broadcast_to(np.float32(tries), state.tries.shape),
    )


def tree_of(shape, num=1):
    zeros = np.zeros((num, shape.num_nodes), np.int32)
    rows = lambda x: np.broadcast_to(np.int32(x)[None], zeros.shape)
    return DraftTree(zeros, rows((-1, *shape.parents)), rows(shape.depths), zeros == 0)


# ---- What it learns -----------------------------------------------------------------------------


def test_levels_that_nobody_tried_are_like_the_one_above():
    """With 3 hits of 4, level 1 has (3 + 0.5) / (4 + 1) = 0.7, and so have those below."""
    drafter = Adversary(None, None, shape=chain(3))
    made = controller(drafter, **HALF)
    column = lambda *x: np.float32(x).reshape(1, 1, 3, 1)
    for tries, expected in (
        ((4, 0, 0), [0.7, 0.49, 0.343]),
        ((4, 2, 0), [0.7, 0.7 * 0.7 / 3, 0.7 * (0.7 / 3) ** 2]),  # level 2: (0 + 0.7) / 3
    ):
        state = seen(empty(drafter, made), column(3, 0, 0), column(*tries))
        reach = reach_of(made, drafter, state, tree_of(chain(3)))
        np.testing.assert_allclose(reach[0, 1:], expected, rtol=1e-5)


def test_a_round_is_remembered_by_depth_and_rank():
    """The second child is kept, whose only child is not: three tries at depth 1, one at 2."""
    drafter = Adversary(None, None, shape=TREE)
    made = controller(drafter, memory=0.5)
    walk = Walk(np.array([[0, 2, 2]]), np.array([1]), np.array([9]))
    state, nodes = empty(drafter, made), np.arange(7)[None]
    for times in (1, 1.5):
        state = learned(made, drafter, state, 2, tree_of(TREE), nodes, walk, ACTIVE)
        assert np.asarray(state.tries)[0, 0, :, :3].tolist() == [[times] * 3, [times, 0, 0]]
        assert np.asarray(state.hits)[0, 0, :, :3].tolist() == [[0, times, 0], [0, 0, 0]]
    assert state.rounds.tolist() == [[0, 0, 2, 0]]
    other = learned(made, drafter, state, 2, tree_of(TREE), nodes, walk, ~ACTIVE)
    jax.tree.map(np.testing.assert_array_equal, other, state)


@pytest.mark.parametrize(("bonus", "hits"), [(5, [1, 0, 0]), (4, [0, 1, 0]), (9, [0, 0, 0])])
def test_drafts_that_were_not_judged_are_learned_from(bonus, hits):
    """The second child was kept, and nothing below it was judged: 5 and 4 stand there."""
    shape = from_paths([[0], [1], [1, 0], [1, 1]])
    drafter = Adversary(None, None, shape=shape)
    made = controller(drafter)
    tree = tree_of(shape).replace(tokens=np.int32([[0, 1, 2, 5, 4]]))
    walk = Walk(np.array([[0, 2]]), np.array([1]), np.array([bonus]))
    state = learned(made, drafter, empty(drafter, made), 1, tree, np.arange(3)[None], walk, ACTIVE)
    assert np.asarray(state.tries)[0, 0, :, :3].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert np.asarray(state.hits)[0, 0, :, :3].tolist() == [[0, 1, 0], hits]


def test_every_grade_is_known_by_itself():
    """By hand: what the third of four grades has accepted says nothing of the others."""

    @struct.dataclass
    class Graded(Adversary):
        num_grades = 4

    drafter = Graded(None, None, shape=chain(2))
    made = controller(drafter, prior=0.25, surest=0.75, weight=1.0)
    walk, nodes = Walk(np.array([[0, 1, 2]]), np.array([2]), NONE), np.arange(3)[None]
    state, tree = empty(drafter, made), tree_of(chain(2))
    state = learned(made, drafter, state, 2, tree, nodes, walk, ACTIVE, np.array([2]))
    first = [float(reach_of(made, drafter, state, tree, np.array([g]))[0, 1]) for g in range(4)]
    np.testing.assert_allclose(first, [0.35, 0.45, (1 + 0.55) / 2, 0.65], rtol=1e-5)


# ---- What it chooses ----------------------------------------------------------------------------


def choose(drafter, made, state, shape):
    choice, nodes = choice_of(made, drafter, state, tree_of(shape), ACTIVE)
    return made.widths_of(drafter)[int(choice) - 1], np.asarray(nodes[0])


def test_it_widens_when_drafts_are_accepted_and_narrows_when_not():
    drafter = Adversary(None, None, shape=chain(15))
    made = controller(drafter)
    state = empty(drafter, made)
    assert made.widths_of(drafter) == (1, 4, 8, 16)
    other = {
        W: made.widths_of(Adversary(None, None, shape=chain(W - 1))) for W in (5, 6, 10, 11, 32)
    }
    assert other == {
        5: (1, 5),
        6: (1, 4, 6),
        10: (1, 4, 10),
        11: (1, 4, 8, 11),
        32: (1, 4, 8, 24, 32),
    }
    states = (seen(state, 20, 20), state, seen(state, 0, 20))
    assert [choose(drafter, made, s, chain(15))[0] for s in states] == [16, 4, 1]


def test_what_the_budget_does_not_cover_is_not_judged():
    """Everything is accepted, but 16 nodes lose 0.8 rounds if not, 8 lose 0.4, and 4 lose 0.2."""
    drafter = Adversary(None, None, shape=chain(15))
    made = controller(drafter)
    state = seen(empty(drafter, made), 20, 20)
    for budget, width in ((0.81, 16), (0.79, 8), (0.39, 4)):
        some = state.replace(budget=np.float32([budget]))
        assert choose(drafter, made, some, chain(15))[0] == width
        assert made.asks(drafter, some, ACTIVE)
    assert not made.asks(drafter, state.replace(budget=np.float32([0.19])), ACTIVE)
    # Of a batch the mean counts.
    two = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), state)
    two = two.replace(budget=np.float32([0.0, 0.45]))
    assert made.asks(drafter, two, np.ones(2, bool))
    assert not made.asks(drafter, two, np.array([True, False]))


def test_the_most_likely_nodes_are_judged():
    """First children are right, so the tree is cut to them before second ones."""
    drafter = Adversary(None, None, shape=TREE)
    made = controller(drafter)
    state = empty(drafter, made)
    _, nodes = choose(drafter, made, seen(state, 9.0 * (np.arange(6) == 0), 10), TREE)
    assert nodes[:3].tolist() == [0, 1, 4]


def check_cut(tree, nodes, width):
    """The cut has whole paths, and no node without the siblings that are tested before it."""
    kept = np.sort(nodes[:, :width], axis=1)
    cut = jax.device_get(jax.jit(DraftTree.take)(tree, kept))
    for b, row in enumerate(kept):
        for v, at in enumerate(row[1:], start=1):
            parent = int(tree.parents[b, at])
            assert row[cut.parents[b, v]] == parent and cut.depths[b, v] == tree.depths[b, at]
            before = [u for u in range(parent + 1, at) if tree.parents[b, u] == parent]
            assert set(before) <= set(row)


@pytest.mark.parametrize("seed", [0, *more(1, 2, 3)])
def test_every_cut_is_a_tree_with_siblings_in_order(seed):
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(0, max(1, v // 4))) for v in range(1, 40)]  # up to 12 children
    ranks = [parents[:v].count(p) for v, p in enumerate(parents)]
    shape = TreeShape(tuple(parents), tuple(ranks))
    drafter = Adversary(None, None, shape=shape)
    made = controller(drafter)
    state = empty(drafter, made, 16)
    tries = rng.integers(0, 9, state.tries.shape) * rng.integers(0, 2, state.tries.shape)
    state, tree = seen(state, rng.integers(0, tries + 1), tries), tree_of(shape, 16)
    _, nodes = choice_of(made, drafter, state, tree, np.ones(16, bool))
    for width in (2, 7, 20, 39):
        check_cut(tree, np.asarray(nodes), width)


def test_a_batch_chooses_what_serves_all_its_rows():
    drafter = Adversary(None, None, shape=chain(15))
    made = controller(drafter, slope=0.4)
    state = seen(empty(drafter, made, 4), 20.0 * np.eye(4)[0].reshape(4, 1, 1, 1), 20)
    state = state.replace(budget=np.full(4, 99.0, np.float32))
    tree = tree_of(chain(15), 4)
    choices = [
        int(choice_of(made, drafter, state, tree, active)[0])
        for active in (np.eye(4)[0] > 0, np.ones(4, bool))
    ]
    assert choices == [4, 1]


# ---- What it spends -----------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [1.2, 6.0])
def test_drafts_that_are_never_right_cost_the_credit_and_the_tolerance(cost):
    """By hand: a round takes 1, or `cost` with drafts; nothing is ever accepted."""
    drafter = Adversary(None, None)
    made = Controller(tolerance=0.05, costs=np.array([1, cost, cost], np.float32))
    walk, tree = Walk(np.zeros((1, 4), np.int32), NONE, NONE), tree_of(chain(3))

    @jax.jit
    def one(state):
        asked = made.asks(drafter, state, ACTIVE)
        proposal, nodes = Proposal(tree, NONE, ()), jnp.arange(4)[None]
        return made.learn(
            drafter, state, jnp.where(asked, 2, 0), proposal, nodes, walk, ACTIVE
        ), asked

    state, time, rounds = empty(drafter, made), 0.0, 400
    for n in range(1, rounds + 1):
        state, asked = one(state)
        time += cost if asked else 1.0
        assert time <= n * 1.05 + made.credit + 1e-3
    assert time >= rounds * 1.03  # it goes on trying
    assert state.rounds.sum() == rounds and state.rounds[0, 2] > 1


def test_forwards_of_the_drafter_are_paid_for():
    """By hand: a try loses 0.2 rounds for four nodes, and half a round per forward."""

    @struct.dataclass
    class Heeding(Adversary):
        heeds_limits = True

    free, heeding = Adversary(None, None), Heeding(None, None)
    made = Controller(costs=np.float32([2, 2, 2.4]), draft_cost=1.0, draft_forwards=2.0)
    # The credit, one round, does not cover two forwards; who heeds limits makes one.
    asked = [bool(made.asks(x, empty(x, made), ACTIVE)) for x in (free, heeding)]
    assert asked == [False, True]
    for left, most in (
        (0.75, 1),
        (1.1, 1),
        (1.21, 2),
        (3.3, 4),
        (0.1, 1),
    ):  # a chain has four nodes
        state = empty(heeding, made).replace(budget=np.float32([left]))
        assert int(made.most_forwards(heeding, state, ACTIVE)) == most
        assert bool(made.asks(heeding, state, ACTIVE)) == (left >= 0.7)
    fixed = made.replace(fixed=1).most_forwards(heeding, state, ACTIVE)
    assert int(fixed) == np.iinfo(np.int32).max

    tree, nodes = tree_of(chain(3)), np.arange(4)[None]
    state = seen(empty(heeding, made), 20, 20).replace(budget=np.float32([2.0]))
    walk = Walk(np.zeros((1, 4), np.int32), NONE, NONE)

    @jax.jit
    def after(state, cost):
        proposal = Proposal(tree, cost, ())
        choice, _ = made.choose(heeding, state, proposal, ACTIVE)
        return choice, made.learn(heeding, state, choice, proposal, nodes, walk, ACTIVE).budget

    for cost, choice, lost in ((1, 2, 0.7), (3, 2, 1.7), (4, 1, 2.0)):
        found, left = after(state, np.int32([cost]))
        assert int(found) == choice and left.tolist() == [pytest.approx(2.01 - lost)]


HEEDING = [kind for kind in DRAFTERS if kind.heeds_limits]


@pytest.mark.parametrize("kind", [*often(HEEDING[0]), *more(*HEEDING[1:], Hybrid)])
def test_who_heeds_limits_makes_no_more_forwards(plain, toy_params, kind):
    """And of two drafters the one that does."""
    cfg, prompts, _, _ = plain
    if kind is Hybrid:
        drafter = Hybrid(PromptLookup(2), Swift.example(cfg, toy_params), threshold=6)
    else:
        drafter = kind.example(cfg, toy_params)
    method = SpeculativeMethod(drafter)
    state = init_state(cfg, method, prompts[:8], gen_len=24)
    state = decode(toy_params, cfg, method, prefill(toy_params, cfg, method, state), 6, FOREVER)

    @jax.jit
    def drafts(state, most):
        context = context_of(toy_params, method, state).replace(most_forwards=most)
        made = drafter.propose(cfg, context, state.drafter)
        return made.cost, (made.tree.depths * made.tree.is_valid).max(axis=1)

    most, behind = 0, issubclass(kind, SmallerModel)  # one reads what was written since
    for limit in (1, 2, 99):
        made, depth = map(np.asarray, drafts(state, np.int32(limit)))
        assert most <= made.max() <= limit + behind and (depth <= limit).all()
        most = made.max()
    if kind.__name__ != "DynamicExit":  # whose exits say nothing here
        assert most > 1


@pytest.mark.exhaustive
def test_a_model_that_is_always_right_is_asked(plain, toy_params):
    cfg, prompts, expected, truth = plain
    right = Adversary(jnp.asarray(truth), jnp.full(64, 1.1), shape=chain(7))
    wrong = Adversary(jnp.asarray(truth), jnp.zeros(64), low=24, high=30, shape=chain(7))
    made = controller(right, slope=0.1, **EAGER | {"credit": 1.0})
    rounds = []
    for drafter in (right, wrong):
        method = SpeculativeMethod(drafter, controller=made)
        state = run(toy_params, cfg, method, prompts)
        assert texts(state, 64) == expected
        check_statistics(state, 7)
        assert (state.control.rounds.sum(axis=1) == state.num_forwards).all()
        rounds.append(np.asarray(state.control.rounds.sum(axis=0)))
    # But for last tokens, behind which there is nothing to be right about.
    assert rounds[0][:2].sum() < 0.2 * rounds[0].sum() < rounds[0][-1]
    assert rounds[1][2:].sum() == 0  # its drafts do not exist, so nothing is judged


# ---- Losslessness -------------------------------------------------------------------------------


FIRST = (PromptLookup, TokenRecycling)


@pytest.mark.parametrize("kind", [*FIRST[:1], *more(*(k for k in DRAFTERS if k != FIRST[0]))])
def test_every_drafter_writes_the_plain_text(plain, toy_params, kind):
    """Greedy or drawn, alone or in a batch; most branches are taken."""
    cfg, prompts, expected, _ = plain
    drafter = kind.example(cfg, toy_params)
    method = SpeculativeMethod(drafter, controller=controller(drafter, **EAGER))
    state = run(toy_params, cfg, method, prompts[:16], gen_len=12)
    assert texts(state, 16) == expected[:16]
    check_statistics(state, drafter.depth)
    rounds = np.asarray(state.control.rounds)
    assert (rounds.sum(axis=1) == state.num_forwards).all()
    assert rounds[:, 1:].any() and (kind not in FIRST or rounds[:, 0].any())
    drawn = Sampling(temperature=0.8)
    alone = run(toy_params, cfg, SpeculativeMethod(sampling=drawn), prompts[:16], gen_len=12)
    state = run(toy_params, cfg, method.replace(sampling=drawn), prompts[:16], gen_len=12)
    assert texts(state, 16) == texts(alone, 16)


@pytest.mark.parametrize(
    "kind",
    [DraftModel, *often(Eagle), *more(DraftModelTree, DraftModelBest, EagleBest, DFlash, Hydra)],
)
def test_rounds_without_drafts_are_made_up_for(plain, toy_params, kind):
    """What is drafted after them is what is drafted when the text so far is a prompt."""
    cfg, prompts, _, _ = plain
    drafter = kind.example(cfg, toy_params)
    method = SpeculativeMethod(drafter, controller=controller(drafter))
    last = len(method.controller.widths_of(drafter))
    step = jax.jit(loop.step, static_argnames="cfg")

    def begin(prompts, num):
        state = init_state(cfg, method, prompts, gen_len=num, prompt_len=40, canvas_len=40)
        return prefill(toy_params, cfg, method, state)

    @jax.jit
    def drafts(state):
        context = context_of(toy_params, method, state)
        tree = drafter.propose(cfg, context, state.drafter).tree
        return jnp.where(tree.is_valid, tree.tokens, -1)

    state = begin(prompts[:8], 40)
    for choice in (last, 0, 0, last, *[0] * 9, last, 0):
        fixed = method.replace(controller=method.controller.replace(fixed=choice))
        state = step(toy_params, cfg, fixed, state)
    going = ~np.asarray(state.has_stopped)
    tokens, length = np.asarray(state.tokens), np.asarray(state.length)
    whole = [row[:n].tolist() for row, n in zip(tokens, length, strict=True)]
    again = begin([row[:40] for row in whole], 1)
    assert going.sum() > 2 and max(map(len, whole)) <= 40
    found, expected = (np.asarray(drafts(s))[going] for s in (state, again))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.exhaustive(every=4)
def test_drawn_drafts_follow_the_targets_law(toy_cfg, toy_params):
    """First tokens of many rows, some of whose trees are cut, against the target's own."""
    drafter = DraftModel(toy_params, toy_cfg, layers=(0,), num_drafts=3, is_sampled=True)
    sampling, prompts = Sampling(temperature=1.0, top_k=3), [[3, 1, 2]] * 512
    plain = SpeculativeMethod(sampling=sampling)
    method = SpeculativeMethod(
        drafter, SpeculativeSampling(), sampling, controller=controller(drafter, **EAGER)
    )
    assert_same_law(
        *(
            texts(run(toy_params, toy_cfg, some, prompts, gen_len=6, seeds=range(512)), 512)
            for some in (plain, method)
        )
    )


@pytest.mark.exhaustive
def test_sharded_is_unsharded(plain, toy_params):
    cfg, prompts, expected, _ = plain
    drafter = TokenRecycling(TREE)
    method = SpeculativeMethod(drafter, controller=controller(drafter, **EAGER))
    mesh = make_mesh(data=2, tensor=2, sequence=2)
    whole = run(toy_params, cfg, method, prompts[:8])
    params = jax.device_put(toy_params, param_shardings(cfg, mesh))
    with jax.set_mesh(mesh):
        split = run(params, cfg, method, prompts[:8])
    assert texts(split, 8) == texts(whole, 8) == expected[:8]
    np.testing.assert_array_equal(split.control.rounds, whole.control.rounds)


def test_nonsense_is_refused(toy_cfg):
    made = controller(PromptLookup())
    refuse = lambda made: SpeculativeMethod(PromptLookup(), controller=made).validate(toy_cfg)
    check_refusals(made, refuse, toy_cfg)
    check_wrong_kinds(made, refuse)
    for change, message in (
        ({"costs": None}, "complete. measures them"),
        ({"costs": np.ones(3, np.float32)}, "must be 5 positive numbers"),
        ({"costs": np.zeros(5, np.float32)}, "must be 5 positive numbers"),
        ({"widths": (4, 2, 11)}, "must rise within"),
        ({"widths": (1, 4, 12)}, "must rise within"),
        ({"fixed": 5}, "fixed=5 must be an index of 5 costs"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(dataclasses.replace(made, **change))
    lossy = SpeculativeMethod(PromptLookup(), Typical(), Sampling(), controller=made)
    with pytest.raises(ValueError, match="Typical is lossy"):
        lossy.validate(toy_cfg)
    assert Controller().widths_of(NoDraft()) == (1,)


def test_nodes_of_a_part_have_its_parents():
    """By hand: of a chain with a side branch, every other node."""
    zeros = np.zeros((1, 5), np.int32)
    tree = DraftTree(zeros, np.int32([[-1, 0, 0, 1, 2]]), np.int32([[0, 1, 1, 2, 2]]), zeros == 0)
    part = tree.take(np.array([[0, 2, 4]]))
    assert part.parents.tolist() == [[-1, 0, 1]] and part.depths.tolist() == [[0, 1, 2]]


def test_own_rows_beside_some_nodes():
    """By hand: of three nodes the middle one is not judged, nor the second of two rows."""
    sees = np.array([[[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]], bool)
    rows = np.array([[5, 6]])
    take = jax.jit(ExtraRows.take, static_argnums=2)
    extra, nodes = ExtraRows(rows, rows, sees, np.ones((1, 2, 4))), np.array([[0, 2]])
    cut = take(extra, nodes, 2)
    assert cut.sees.tolist() == [[[True, False, True, False], [False, True, True, True]]]
    cut = take(extra, nodes, 1)
    assert cut.sees.tolist() == [[[True, False, True]]] and cut.tokens.tolist() == [[5]]
    assert cut.vectors.shape == (1, 1, 4) and cut.offsets.tolist() == [[5]]
    cut = take(extra.replace(nodes=np.array([[1, 2]])), nodes, 1)  # the first is behind no node
    assert cut.sees.tolist() == [[[False, True, True]]] and cut.tokens.tolist() == [[6]]
