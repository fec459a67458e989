"""DDTree: the best prefixes against public code and brute force; over every block drafter."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import draw
from decode.core.streams import fold_in
from decode.speculative.accept import Match, SpeculativeSampling, Verdict
from decode.speculative.components import DDTree, DFlash, Masks, Medusa, PromptLookup
from decode.speculative.controller import Controller
from decode.speculative.drafters.ddtree import best_first
from decode.speculative.loop import SpeculativeMethod, init_state, prefill, stream
from tests.lib.heads import shaken
from tests.lib.paths import GOLDEN
from tests.lib.speculation import run, texts
from tests.lib.tiers import more

TRACES = GOLDEN / "ddtree"
tree_of, log_softmax = jax.jit(best_first, static_argnames="most"), jax.jit(jax.nn.log_softmax)
walk_of = jax.jit(Match().walk, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def best(log_p, num):
    """The best `num` tokens of laws [J, V], as [1, J, num] tokens and log-probabilities."""
    log_probs, tokens = jax.lax.top_k(jnp.asarray(log_p, jnp.float32)[None], num)
    return tokens, log_probs


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def log_laws(seed, J, V, scale=1.5):
    return jax.nn.log_softmax(scale * jax.random.normal(jax.random.key(seed), (J, V)))


def ways(tree, b=0):
    """The tokens on the way to every node but the root that exists."""
    tree = jax.device_get(tree)
    tokens, parents = tree.tokens[b], tree.parents[b]
    found = {0: ()}
    for v in np.flatnonzero(tree.is_valid[b])[1:]:
        assert parents[v] < v and tree.depths[b, v] == len(found[parents[v]]) + 1
        found[v] = (*found[parents[v]], int(tokens[v]))
    return list(found.values())[1:]


@pytest.mark.parametrize("case", json.loads((TRACES / "ddtree.json").read_text())["cases"])
def test_golden_trees_and_walks(case):
    logits, n = np.load(TRACES / "ddtree.npz")[case["logits"]], case["budget"]
    said = best(log_softmax(logits), min(n, case["V"]))
    tree = tree_of(np.array([5]), *said, n, most=n)
    tokens, depths, parents = (
        np.asarray(x)[0].tolist() for x in (tree.tokens, tree.depths, tree.parents)
    )
    assert (tokens[1:], depths[1:]) == (case["tokens"], case["depths"])
    assert parents == case["parents"]
    chosen, key = np.array([case["chosen"]], np.int32), np.zeros((1, 2), np.uint32)
    walk = walk_of(Verdict(tree, chosen, None, key), case["D"])
    path = np.asarray(walk.path)[0, : int(walk.num_accepted[0]) + 1]
    assert path.tolist() == case["accepted"] and walk.bonus.tolist() == [case["bonus"]]


@pytest.mark.parametrize(("J", "V"), [(3, 5), *more((1, 4), (2, 3))])
def test_the_best_prefixes_by_brute_force(J, V):
    """Of every budget, with one program; what there is no more does not exist."""
    most = 12
    before = tree_of._cache_size()
    for seed in range(5):
        log_p = np.asarray(log_laws(seed, J, V))
        every = [way for d in range(1, J + 1) for way in itertools.product(range(V), repeat=d)]
        value = lambda way, log_p=log_p: sum(log_p[d, t] for d, t in enumerate(way))
        every.sort(key=value, reverse=True)
        for budget in (0, 1, 4, 11, 12):
            said = best(log_p, min(most, V))
            tree = tree_of(jnp.array([1]), *said, jnp.int32(budget), most=most)
            found = ways(tree)
            assert found == every[:budget] and len(found) == min(budget, len(every))
            assert (np.diff([value(way) for way in found]) <= 1e-6).all()
    assert tree_of._cache_size() == before + 1


def test_of_a_sure_drafter_it_is_the_chain():
    log_p = np.where(np.arange(6) == np.array([[3], [1], [4]]), np.float32(0), -np.inf)
    tree = jax.device_get(tree_of(np.array([2]), *best(log_p, 5), 5, most=5))
    assert tree.is_valid.tolist() == [[True] * 4 + [False] * 2]
    assert tree.tokens[0, :4].tolist() == [2, 3, 1, 4]
    assert tree.parents[0, :4].tolist() == [-1, 0, 1, 2]


# ---- What is written --------------------------------------------------------------------------

V = 4
MARGINALS = log_laws(3, 2, V)
TARGET = jax.nn.softmax(log_laws(4, V + 1, V))  # behind each token; V: at the beginning


@functools.partial(jax.jit, static_argnames=("rule", "drawn"))
def two_tokens(key, rule, drawn):
    """Of a round for each key: the first two tokens as one number, and how many were accepted."""
    num = len(key)
    said = [jnp.broadcast_to(x, (num, *x.shape[1:])) for x in best(MARGINALS, V)]
    tree = best_first(jnp.full(num, V), *said, 7, 7)
    if drawn != "none":  # what the tree is not
        laws = jnp.exp(MARGINALS)[jnp.minimum(tree.depths, 1)]
        tree = tree.replace(probs=laws, drawn=drawn)
    laws = TARGET[tree.tokens]
    verdict = Verdict(tree, draw(fold_in(key, 1), laws), laws, fold_in(key, 2))
    walk = rule.walk(verdict, 2)
    tokens = jnp.take_along_axis(tree.tokens, walk.path, axis=1)
    first = jnp.where(walk.num_accepted >= 1, tokens[:, 1], walk.bonus)
    later = draw(fold_in(key, 3), TARGET[first])
    second = jnp.where(walk.num_accepted == 1, walk.bonus, later)
    second = jnp.where(walk.num_accepted == 2, tokens[:, 2], second)
    return first * V + second, walk.num_accepted


def chi_square(rule, num, drawn="none"):
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), num))
    codes, accepted = two_tokens(keys, rule, drawn)
    assert float(accepted.mean()) > 0.3
    p = np.asarray(TARGET, np.float64)
    expected = num * (p[V][:, None] * p[:V]).reshape(-1)
    counts = np.bincount(np.asarray(codes), minlength=V * V)
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("rule", [Match(), SpeculativeSampling()])
@pytest.mark.parametrize("num", [20_000, *more(200_000)])
def test_the_text_follows_the_targets_law(rule, num):
    assert chi_square(rule, num) < 45  # 15 degrees of freedom: once in 12,000 times


def test_marginals_are_no_law_that_nodes_were_drawn_from():
    """The ratio test of drawn drafts notices nothing: the text does."""
    assert chi_square(SpeculativeSampling(), 20_000, "without") > 45


def test_what_is_accepted_is_what_the_weights_sum_to():
    """Where the text follows the product of the laws."""
    J, num, most = 3, 20_000, 9
    log_p = log_laws(8, J, V)
    tree = tree_of(jnp.array([0]), *best(log_p, V), most, most=most)
    found = ways(tree)
    expected = sum(np.exp(sum(float(log_p[d, t]) for d, t in enumerate(way))) for way in found)

    @jax.jit
    def accepted_of(key):
        """With one text per row, drawn from the product of the laws."""
        text = draw(key, jnp.broadcast_to(jnp.exp(log_p)[None], (num, J, V)))
        trees = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, *x.shape[1:])), tree)
        chosen = jnp.take_along_axis(text, jnp.minimum(trees.depths, J - 1), axis=1)
        return Match().walk(Verdict(trees, chosen, None, key), J).num_accepted

    accepted = np.asarray(
        accepted_of(jax.random.key_data(jax.random.split(jax.random.key(1), num)))
    )
    assert abs(accepted.mean() - expected) < 3 * accepted.std() / np.sqrt(num)


# ---- Over every block drafter -----------------------------------------------------------------


def block_drafter(name, cfg, params):
    kind = {"masks": Masks, "medusa": Medusa, "dflash": DFlash}[name]
    return kind.example(cfg, params)


@pytest.mark.parametrize("name", more("masks", "medusa", "dflash"))
@pytest.mark.parametrize("controlled", [False, True])
def test_texts_stay_and_more_is_accepted_than_of_the_chain(plain, toy_params, name, controlled):
    cfg, prompts, rows, _ = plain
    drafter = block_drafter(name, cfg, toy_params)
    costs = np.ones(4, np.float32)
    controller = Controller(widths=(1, 4, 13), costs=costs, credit=50.0) if controlled else None
    accepted = {}
    for budget in (2, 12):
        method = SpeculativeMethod(DDTree(drafter, budget, max_budget=12), controller=controller)
        state = run(toy_params, cfg, method, prompts[:8])
        assert texts(state, 8) == rows[:8]
        histogram = np.asarray(state.acceptance_histogram).sum(axis=0)
        accepted[budget] = (histogram * np.arange(len(histogram))).sum() / histogram.sum()
    assert accepted[12] >= accepted[2]


@pytest.mark.exhaustive(every=4)
def test_masks_guess_alike_behind_a_node_of_a_tree_and_of_a_chain(plain, toy_params):
    """With some nodes judged only, too: what is remembered follows from the text alone."""
    cfg, prompts, _, _ = plain
    masks = Masks.example(cfg, toy_params)
    masks = masks.replace(network=masks.network.replace(own=shaken(masks.network.own)))
    some = Controller(widths=(1, 6), costs=np.ones(3, np.float32), fixed=2)
    remembered = []
    for drafter, controller in ((masks, None), (DDTree(masks), None), (DDTree(masks), some)):
        method = SpeculativeMethod(drafter, controller=controller)
        first = init_state(cfg, method, prompts[:4], gen_len=12, chunk=8)
        found = {}
        for state in stream(toy_params, cfg, method, prefill(toy_params, cfg, method, first)):
            is_known = np.asarray(state.drafter.is_known & ~state.has_stopped)
            for b in np.flatnonzero(is_known):
                at = int(b), int(state.length[b])
                found[at] = np.asarray(state.drafter.hidden[b])
        remembered.append(found)
    chain, tree, part = remembered
    for other in (tree, part):
        both = chain.keys() & other.keys()
        assert len(both) > 8
        for at in both:
            np.testing.assert_allclose(chain[at], other[at], atol=1e-4)


def test_who_knows_no_marginals_is_refused(toy_cfg, toy_params):
    masks = Masks.example(toy_cfg, toy_params)
    for drafter in (
        PromptLookup(),
        dataclasses.replace(masks, is_quadratic=False),
        dataclasses.replace(masks, is_sampled=True),
        dataclasses.replace(DFlash.example(toy_cfg, toy_params), is_sampled=True),
    ):
        with pytest.raises(ValueError, match=f"drafter={type(drafter).__name__} must be one that"):
            DDTree(drafter).validate(toy_cfg)
    with pytest.raises(ValueError, match="num_drafts=9 must be in"):
        DDTree(dataclasses.replace(masks, num_drafts=9)).validate(toy_cfg)
