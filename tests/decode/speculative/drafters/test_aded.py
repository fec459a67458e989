"""Trees of trigrams, against the card's search in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.core.streams import uniforms
from decode.speculative.contracts import Context
from decode.speculative.drafters.aded import ADED, LEVELS
from decode.speculative.drafters.trigrams import add, count_trigrams, empty, look_up
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more

V, S = 9, 40
f = np.float32


def context_of(rows, seed=0):
    lengths = [len(row) for row in rows]
    tokens = np.full((len(rows), S), 1, np.int32)  # what lies behind is noise
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    key = np.random.default_rng(seed).integers(2**32, size=(len(rows), 2), dtype=np.uint32)
    return Context(
        params={}, tokens=jnp.asarray(tokens), length=jnp.asarray(lengths, jnp.int32),
        key=jnp.asarray(key), sampling=Sampling(None), active=jnp.ones(len(rows), bool),
        cache=None,
    )  # fmt: skip


def learned(text, window, increment, most, table=None):
    """A table after a round: by pair, what counts how much."""
    table = {pair: dict(known) for pair, known in (table or {}).items()}
    last = text[-window:]
    for a, b, c in zip(last, last[1:], last[2:], strict=False):
        known = table.setdefault((a, b), {})
        known[c] = min(f(known.get(c, f(0)) + f(increment)), f(most))
    return table


def by_hand(text, table, drafter, chance):
    """Paths of the tree and visits of the search, as the card recommends it."""
    if len(text) < 2:
        return [], 0
    known = lambda pair: sorted(table.get(pair, {}).items(), key=lambda item: (-item[1], item[0]))
    root = (text[-2], text[-1])
    visits, scores, children = {(): f(0)}, {(): f(0)}, {}
    pair_of = lambda path: ((*root, *path))[-2:]
    for i in range(drafter.num_visits):
        path, score, rolls, way = (), f(1), False, [()]
        for level in range(LEVELS):
            options = known(pair_of(path))
            if not options:
                break
            values = np.array([value for _, value in options], f)
            if rolls:
                weights = np.cumsum(values, dtype=f)
                wanted = f(chance[i * LEVELS + level]) * weights[-1]
                k = min(int((weights <= wanted).sum()), len(options) - 1)
            elif path in children:
                merits = []
                for (token, value), child in zip(options, children[path], strict=True):
                    N, Q, above = visits[child], scores[child], visits[path]
                    explore = f(drafter.c1) + np.log((above + f(drafter.c2) + f(1)) / f(drafter.c2))
                    explore = explore * value * np.sqrt(above) / (f(1) + N)
                    merits.append(Q / N + explore if N else np.inf)
                    assert child[-1] == token
                k = int(np.argmax(merits))
            else:
                children[path] = [(*path, token) for token, _ in options]
                for child in children[path]:
                    visits[child], scores[child] = f(0), f(0)
                k = len(options) - 1
                rolls = True
                way.append((*path, options[k][0]))
                path, score = way[-1], score + values[k]
                continue
            path, score = (*path, options[k][0]), score + values[k]
            if not rolls:
                way.append(path)
        for node in way:
            visits[node], scores[node] = visits[node] + f(1), scores[node] + score
    rank = lambda path: [[t for t, _ in known(pair_of(path[:i]))].index(path[i])
                         for i in range(len(path))]  # fmt: skip
    order = sorted(visits, key=lambda path: (-visits[path], len(path), rank(path)))
    kept = order[: drafter.num_kept]
    more_ = [(*path, known(pair_of(path))[0][0]) for path in kept if path and known(pair_of(path))]
    return sorted({*kept[1:], *more_}), visits


def paths(tree, b):
    tokens, parents, depths, is_valid = (
        np.asarray(x)[b] for x in (tree.tokens, tree.parents, tree.depths, tree.is_valid)
    )
    found = {0: ()}
    for v in range(1, len(tokens)):
        if is_valid[v]:
            assert parents[v] < v and parents[v] in found
            found[v] = (*found[parents[v]], int(tokens[v]))
            assert depths[v] == len(found[v])
    return list(found.values())[1:]


@pytest.mark.parametrize("seed", [0, *more(*range(1, 8))])
def test_trees_are_those_of_the_search(seed):
    """Two rounds, of which the second has what the first has learned."""
    rng = np.random.default_rng(seed)
    drafter = ADED(num_pairs=512, num_successors=V, num_visits=60, num_kept=12, window=30)
    rows = [rng.integers(0, rng.integers(2, 5), rng.integers(9, 30)).tolist() for _ in range(9)]
    rows += [[1, 2, 3] * 5, [4], []]
    state, tables = drafter.init(None, len(rows), S), [{}] * len(rows)
    propose, most = as_one_program(drafter.propose), 0
    for turn in range(2):
        context = context_of(rows, seed + turn)
        made = propose(None, context, state)
        state = made.state
        chance = np.asarray(uniforms(context.key, drafter.num_visits * LEVELS))
        for b, row in enumerate(rows):
            tables[b] = learned(row, drafter.window, 0.04, 3.0, tables[b])
            expected, _ = by_hand(row, tables[b], drafter, chance[b])
            found = paths(made.tree, b)
            assert len(found) == len(set(found)) and sorted(found) == expected, row
            most = max(most, len(found))
        rows = [[*row, int(rng.integers(0, V))] for row in rows]
    assert most > 14


def test_visits_add_up():
    """All of them are the root's, and its children's, as far as it is known."""
    drafter = ADED(num_pairs=64)
    context = context_of([[1, 2, 3, 1, 2, 4, 1, 2, 3, 3, 1, 2], [1, 2, 3]])

    @as_one_program
    def search(context):
        state = drafter._learn(context, drafter.init(None, 2, S))
        tokens, values = drafter._known(state, drafter._last(context, 2))
        return drafter._search(context, values)[0], tokens

    visits, tokens = search(context)
    K = drafter.num_successors
    assert visits[:, 0].tolist() == [150, 150]
    assert visits[:, 1 : K + 1].sum(axis=1).tolist() == [150, 0]
    assert tokens[0, 0, :3].tolist() == [3, 4, -1] and visits[0, 1] > visits[0, 2] > 10


@pytest.mark.exhaustive(every=4)
def test_a_source_that_never_varies_is_drafted_to_the_end():
    """Four tokens, in a round that has seen it once."""
    drafter = ADED(num_pairs=64)
    made = as_one_program(drafter.propose)(
        None, context_of([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]]), drafter.init(None, 1, S)
    )
    assert paths(made.tree, 0) == [(2,), (2, 3), (2, 3, 4), (2, 3, 4, 5)]


def test_what_is_learned_in_a_round():
    """Trigrams of the window alone, in every round again, up to the cap; each as often as it is."""
    drafter = ADED(num_pairs=64, window=5, increment=0.4, cap=1.0)
    learn = as_one_program(lambda context, state: drafter._learn(context, state))
    context = context_of([[7, 7, 7, 1, 2, 3, 4, 5], [6, 6, 6, 6]])
    state = drafter.init(None, 2, S)
    for expected in (0.4, 0.8, 1.0, 1.0):
        state = learn(context, state)
        pairs = jnp.array([[[7, 7], [1, 2], [3, 4]], [[6, 6], [1, 2], [-1, 6]]])
        tokens, values = as_one_program(look_up)(state, None, pairs)
        assert tokens[:, :, 0].tolist() == [[-1, 3, 5], [6, -1, -1]]
        twice = min(1.0, 2 * expected)
        np.testing.assert_allclose(values[:, :, 0], [[0, expected, expected], [twice, 0, 0]])
    still = learn(context.replace(active=jnp.array([False, True])), state)
    np.testing.assert_array_equal(still.values[0], state.values[0])


def test_full_places_go_to_what_is_new():
    """Of successors the one that counts least goes, and of pairs the one with the least."""
    put = jax.jit(lambda table, trigram, much: add(table, None, trigram[None], jnp.ones(1, bool),
                                                   much, 9.0))  # fmt: skip
    table = empty(1, 8, 2)
    for token, much in ((3, 0.5), (4, 0.2), (3, 0.5), (5, 0.1)):
        table = put(table, jnp.array([1, 2, token]), much)
    tokens, values = as_one_program(look_up)(table, None, jnp.array([[[1, 2]]]))
    assert tokens[0, 0].tolist() == [3, 5]
    np.testing.assert_allclose(values[0, 0], [1.0, 0.1], rtol=1e-6)
    for i in range(8):  # one bucket, of which (1, 2) is the richest
        table = put(table, jnp.array([20, 30 + i, 4]), 0.3 + 0.01 * i)
    left = {tuple(pair) for pair in np.asarray(table.pairs[0]).tolist()}
    assert left == {(1, 2), *((20, 30 + i) for i in range(1, 8))}


def test_what_a_corpus_knows_is_there_from_the_first_round():
    """Shares of the most frequent; what a row learns is its own."""
    texts = [[1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 5], [6, 7], [8, 8, 8]]
    corpus = count_trigrams(texts, 2)
    pairs = jnp.array([[[1, 2], [8, 8], [6, 7]]] * 2)
    tokens, values = as_one_program(look_up)(empty(2, 8, 2), corpus, pairs)
    assert tokens[1].tolist() == [[3, 4], [8, -1], [-1, -1]]
    np.testing.assert_allclose(values[1], [[0.5, 0.25], [1, 0], [0, 0]])
    trigrams = jnp.array([[1, 2, 3], [1, 2, 3]])
    own = as_one_program(add)(empty(2, 8, 2), corpus, trigrams, jnp.array([True, False]), 0.04, 3.0)
    _, values = as_one_program(look_up)(own, corpus, pairs)
    np.testing.assert_allclose(values[:, 0], [[0.54, 0.25], [0.5, 0.25]])
    drafter = ADED(corpus, num_successors=2, num_pairs=8, num_kept=7)
    made = as_one_program(drafter.propose)(None, context_of([[1, 2]]), drafter.init(None, 1, S))
    assert {(3,), (4,), (3, 1)} <= set(paths(made.tree, 0))


def test_settings_that_make_no_sense_are_refused(toy_cfg):
    for drafter, message in (
        (ADED(num_pairs=12), "num_pairs=12 must be a multiple of 8"),
        (ADED(num_successors=1, num_kept=6), "num_kept=6 must be at most 4"),
        (ADED(count_trigrams([[1, 2, 3]], 3)), "num_successors=12 must be 3"),
    ):
        with pytest.raises(ValueError, match=message):
            drafter.validate(toy_cfg)
    with pytest.raises(ValueError, match="none has three tokens"):
        count_trigrams([[1, 2]])
