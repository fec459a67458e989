"""OPT-Tree: growth against public code and brute force; its drafters beside those of EAGLE-2."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling, draw
from decode.core.streams import fold_in
from decode.speculative.accept import Match, Verdict
from decode.speculative.components import DraftModelBest, DraftModelOpt, EagleBest, EagleOpt
from decode.speculative.contracts import Context
from decode.speculative.drafters.opt_tree import grow
from decode.speculative.loop import SpeculativeMethod, drafted, init_state, prefill
from tests.lib.heads import shaken
from tests.lib.paths import GOLDEN
from tests.lib.speculation import run, texts
from tests.lib.tiers import more

TRACES = GOLDEN / "opt_tree"
V, B = 7, 14
TABLE = np.random.default_rng(0).normal(0, 1.5, (V, V)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("budget", "levels"))
def grown(table, roots, threshold, budget, levels):
    """Growth where a token's logits follow from the token before."""
    num = len(roots)
    context = Context(
        params={}, tokens=roots[:, None], length=jnp.ones(num, jnp.int32), key=None,
        sampling=Sampling(None), active=jnp.ones(num, bool), cache=None,
    )  # fmt: skip
    score = lambda tree, states: (table[tree.tokens], states)
    states = jnp.zeros((num, budget + 1, 0))
    return grow(context, levels, threshold, table[roots][:, None], states, score)


def ways(tree, b=0):
    """The tokens on the way to every node but the root that exists."""
    tree = jax.device_get(tree)
    found = {0: ()}
    for v in np.flatnonzero(tree.is_valid[b])[1:]:
        parent = tree.parents[b, v]
        assert parent < v and tree.depths[b, v] == len(found[parent]) + 1
        found[v] = (*found[parent], int(tree.tokens[b, v]))
    return [*found.values()][1:]


@pytest.mark.parametrize("case", json.loads((TRACES / "opt_tree.json").read_text())["cases"])
def test_golden_trees(case):
    """Its sums lag by a level, which is drafted in vain."""
    table, root = np.load(TRACES / "opt_tree.npz")[case["table"]], np.array([case["root"]])
    at = functools.partial(grown, table, root, budget=case["nodes"])
    growth = at(case["threshold"], levels=case["max_depth"] - 1)
    assert growth.level.tolist() == [case["levels_used"]] == [case["levels_drafted"] - 1]
    assert sorted(ways(growth.tree)) == sorted(map(tuple, case["final_paths"]))
    np.testing.assert_allclose(growth.mass, [case["final_weight"]], atol=1e-4)
    sums = [float(at(0.0, levels=d).mass[0]) for d in range(1, len(case["weight_sums"]) + 1)]
    np.testing.assert_allclose(sums, case["weight_sums"], atol=1e-4)


def by_hand(root, budget, levels, threshold):
    """The card's loop: n nodes of every level are expanded, and all are remembered."""
    p = np.exp(TABLE.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    frontier, seen, mass, level = [((), 1.0)], [], 0.0, 0
    while level < levels:
        found = [((*way, t), w * p[(root, *way)[-1], t]) for way, w in frontier for t in range(V)]
        frontier = sorted(found, key=lambda node: -node[1])[:budget]
        seen += frontier
        best = sorted(seen, key=lambda node: -node[1])[:budget]
        before, mass, level = mass, sum(w for _, w in best), level + 1
        if not mass - before > threshold:
            break
    return sorted(way for way, _ in best), mass, level


@pytest.mark.parametrize("budget", [9, *more(1, 3, 30)])
def test_growth_by_hand(budget):
    """Rows stop at different levels, each as if alone; fewer nodes than there is room for."""
    roots, stops = jnp.arange(B) % V, set()
    for threshold in (0.0, 0.2, 0.45, 2.0):
        growth = grown(TABLE, roots, threshold, budget=budget, levels=5)
        for b in range(B):
            expected, mass, level = by_hand(b % V, budget, 5, threshold)
            assert sorted(ways(growth.tree, b)) == expected
            assert float(growth.mass[b]) == pytest.approx(mass, abs=1e-5)
            assert int(growth.level[b]) == level
        stops |= set(growth.level.tolist())
    assert len(stops) > 2 or budget < 9


def test_the_mass_is_what_a_perfect_draft_has_accepted():
    num, budget = 20_000, 8
    growth = grown(TABLE, jnp.array([3]), 0.1, budget=budget, levels=5)

    @jax.jit
    def accepted_of(key):
        trees = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape[1:])), growth.tree)
        chosen = draw(fold_in(key, 1), jax.nn.softmax(jnp.asarray(TABLE))[trees.tokens])
        return Match().walk(Verdict(trees, chosen, None, key), budget).num_accepted

    accepted = np.asarray(
        accepted_of(jax.random.key_data(jax.random.split(jax.random.key(0), num)))
    )
    assert abs(accepted.mean() - float(growth.mass[0])) < 3 * accepted.std() / np.sqrt(num)


# ---- Drafters ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(plain, toy_params):
    """OPT-Tree that never stops, and EAGLE-2 that expands as many nodes as it keeps."""
    cfg = plain[0]
    network = EagleOpt.example(cfg, toy_params).network
    network = network.replace(own=shaken(network.own))
    sizes, wide = dict(budget=6, levels=4), dict(width=6)
    return {
        "model": (
            DraftModelOpt(toy_params, cfg, **sizes, threshold=0.0, layers=(0,)),
            DraftModelBest(toy_params, cfg, **sizes, **wide, layers=(0,)),
        ),
        "eagle": (EagleOpt(network, **sizes, threshold=0.0), EagleBest(network, **sizes, **wide)),
    }


@pytest.mark.parametrize("name", ["eagle", *more("model")])
@pytest.mark.exhaustive(every=4)
def test_the_best_nodes_are_those_of_a_wide_search(plain, toy_params, pairs, name):
    cfg, prompts, _, _ = plain
    found = []
    for drafter in pairs[name]:
        method = SpeculativeMethod(drafter)
        state = init_state(cfg, method, prompts[:8], gen_len=12, chunk=8)
        tree = drafted(toy_params, cfg, method, prefill(toy_params, cfg, method, state))
        found.append([sorted(ways(tree, b)) for b in range(8)])
    assert found[0] == found[1]
    assert len({tuple(map(len, row)) for row in found[0]}) > 1  # not all of one shape


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["model", *more("eagle")])
def test_forwards_are_charged_as_they_are_used(plain, toy_params, pairs, name):
    """A level that adds little is the last one; a row's is not that of its neighbours."""
    cfg, prompts, rows, _ = plain
    spent = {}
    for threshold in (0.0, 0.3, 1.5):
        drafter = pairs[name][0].replace(threshold=threshold)
        state = run(toy_params, cfg, SpeculativeMethod(drafter), prompts[:8])
        assert texts(state, 8) == rows[:8]
        spent[threshold] = np.asarray(state.draft_forwards / state.num_forwards)
    most = {"eagle": 1, "model": 2}[name]  # which reads what was kept besides
    assert (spent[1.5] <= most).all() and (spent[0.0] > spent[1.5]).all()
    assert len(set(spent[0.3].tolist())) > 1
    assert spent[1.5].mean() < spent[0.3].mean() < spent[0.0].mean()


def test_ways_of_both_sizes_are_there():
    """A deep tree and a flat one come out of the same call."""
    sure = np.where(np.eye(V, k=1) + np.eye(V, k=1 - V) > 0, 9.0, 0.0).astype(np.float32)
    table = np.where(np.arange(V)[:, None] < 4, sure, 0.0).astype(np.float32)
    growth = grown(table, jnp.array([0, 5]), 0.5, budget=6, levels=4)
    assert growth.level.tolist() == [4, 2]
    depths = np.asarray(jnp.where(growth.tree.is_valid, growth.tree.depths, 0)).max(axis=1)
    assert depths.tolist() == [4, 1]
    assert (1, 2, 3, 4) in ways(growth.tree)


def test_drawn_drafts_are_refused(toy_cfg, toy_params):
    drafter = DraftModelOpt(toy_params, toy_cfg, is_sampled=True)
    with pytest.raises(ValueError, match="is_sampled=True does not go with the most probable"):
        drafter.validate(toy_cfg)
