"""Drafts from a datastore, against counts in plain Python."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.datastore import (
    SORTED_BY,
    Datastore,
    build_datastore,
    load_datastore,
    sort_suffixes,
)
from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters.rest import REST
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more

V = 4


def store(folder, texts):
    build_datastore(texts, V, folder)
    return load_datastore(folder)


def context_of(rows):
    lengths = [len(row) for row in rows]
    tokens = np.full((len(rows), max(lengths) + 3), 1, np.int32)  # what lies behind is noise
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return Context(
        params={}, tokens=jnp.asarray(tokens), length=jnp.asarray(lengths, jnp.int32),
        key=jnp.zeros((len(rows), 2), jnp.uint32), sampling=Sampling(None),
        active=jnp.ones(len(rows), bool), cache=None,
    )  # fmt: skip


def counted(text, texts, drafter):
    """Beginnings of what follows the longest suffix of a text that comes up, and their counts."""
    for n in range(min(drafter.max_suffix, len(text)), drafter.min_suffix - 1, -1):
        found = [
            other[i + n : i + n + drafter.draft_len]
            for other in texts
            for i in range(len(other) - n + 1)
            if other[i : i + n] == text[-n:]
        ]
        if found:
            ways = (tuple(way[:d]) for way in found for d in range(1, len(way) + 1))
            return n, collections.Counter(ways)
    return 0, collections.Counter()


def paths(tree, b):
    """Token sequences of a row's nodes that exist, each below its parent and behind it."""
    tokens, parents, depths, is_valid = (
        np.asarray(x)[b] for x in (tree.tokens, tree.parents, tree.depths, tree.is_valid)
    )
    found = {0: ()}
    for v in range(1, len(tokens)):
        assert 0 <= parents[v] < v and (not is_valid[v] or parents[v] in found)
        if is_valid[v]:
            found[v] = (*found[parents[v]], int(tokens[v]))
            assert depths[v] == len(found[v])
    return list(found.values())[1:]


@pytest.mark.parametrize("seed", [0, *more(*range(1, 12))])
def test_the_most_frequent_ways_on(tmp_path, seed):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, 3, rng.integers(0, 40)).tolist() for _ in range(8)] + [[0, 1]]
    drafter = REST(
        store(tmp_path, texts), num_drafts=9, draft_len=4, max_suffix=5, min_suffix=2,
        num_places=400,
    )  # fmt: skip
    rows = [rng.integers(0, 3 + b % 2, rng.integers(1, 20)).tolist() for b in range(24)]
    rows += [text[:n] for text, n in zip(texts, (9, 5, 12, 20, 7, 3, 8, 15), strict=False) if text]
    made = as_one_program(drafter.propose)(None, context_of(rows), ())
    whole = 0
    for b, row in enumerate(rows):
        n, counts = counted(row, texts, drafter)
        found = paths(made.tree, b)
        assert len(found) == len(set(found)) == min(9, len(counts)), row
        drafted = sorted((counts[way] for way in found), reverse=True)
        assert drafted == sorted(counts.values(), reverse=True)[: len(found)]
        order = [(counts[way], -len(way)) for way in found]
        assert order == sorted(order, reverse=True)
        assert made.grade[b] == max(n - 2, 0)
        whole += len(found) == 9
    assert whole > 2


def test_of_many_places_some_are_read(tmp_path):
    """Spread evenly over all: shares stay about what they are."""
    texts = [[0, 1, 2]] * 60 + [[0, 1, 3]] * 30 + [[0, 1]] * 10
    drafter = REST(store(tmp_path, texts), num_drafts=2, draft_len=1, num_places=10)
    made = as_one_program(drafter._places)(context_of([[3, 0, 1], [2, 3]]))
    slot, num, _ = made
    assert num.tolist() == [10, 0]
    behind = np.asarray(drafter.datastore.read(slot, 1))[0, :, 0].tolist()
    assert behind == [-1] + [2] * 6 + [3] * 3
    tree = as_one_program(drafter.propose)(None, context_of([[3, 0, 1], [2, 3]]), ()).tree
    assert paths(tree, 0) == [(2,), (3,)] and paths(tree, 1) == []


@pytest.mark.parametrize("num", [1, 2, 3, 90])
def test_suffixes_are_sorted(num):
    tokens = np.random.default_rng(num).integers(-1, 2, num).astype(np.int32)
    order = sort_suffixes(tokens, SORTED_BY).tolist()
    assert sorted(order) == list(range(num))
    texts = [tokens[i : i + SORTED_BY].tolist() for i in order]
    assert texts == sorted(texts)


def test_patterns_are_found_where_they_are():
    tokens = np.array([1, 2, 1, 2, -1, 1, 2, 3, -1], np.int32)
    datastore = Datastore(
        jnp.asarray(tokens), jnp.asarray(sort_suffixes(tokens, SORTED_BY)), vocab_size=V
    )
    pattern = jnp.array([[[1, 2, 1], [1, 2, 0], [3, 0, 0], [0, 0, 0], [3, 3, 0]]])
    first, last = as_one_program(datastore.find)(pattern, jnp.array([3, 2, 1, 1, 2]))
    slots = [
        sorted(np.asarray(datastore.suffixes)[a:b].tolist())
        for a, b in zip(first[0], last[0], strict=True)
    ]
    assert slots == [[0], [0, 2, 5], [7], [], []]


def test_what_is_no_datastore_is_refused(tmp_path, toy_cfg):
    for texts, message in (([[], []], "0 tokens"), ([[V]], r"4, not in \[0, vocab_size=4")):
        with pytest.raises(ValueError, match=message):
            build_datastore(texts, V, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokens\.npy is missing"):
        load_datastore(tmp_path)
    with pytest.raises(ValueError, match="datastore is a PosixPath, which must be what"):
        REST(tmp_path).validate(toy_cfg)
    drafter = REST(store(tmp_path, [[1, 2, 3]]))
    with pytest.raises(ValueError, match="a vocabulary of 4 tokens and the target has"):
        drafter.validate(toy_cfg)
    with pytest.raises(ValueError, match="must be at most 32 together"):
        drafter.replace(draft_len=17).validate(toy_cfg)
    np.save(tmp_path / "suffixes.npy", np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"suffixes\.npy holds \(2,\) int32, which must be \(4,\)"):
        load_datastore(tmp_path)
