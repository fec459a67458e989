"""Suffix decoding, against counts in plain Python."""

import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.matches import match_lengths
from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters.suffix import Suffix
from decode.speculative.loop import SpeculativeMethod
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more


def context_of(rows):
    lengths = [len(row) for row in rows]
    tokens = np.full((len(rows), max(lengths) + 3), 1, np.int32)  # what lies behind is noise
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return Context(
        params={}, tokens=jnp.asarray(tokens), length=jnp.asarray(lengths, jnp.int32),
        key=jnp.zeros((len(rows), 2), jnp.uint32), sampling=Sampling(temperature=None),
        active=jnp.ones(len(rows), bool), cache=None,
    )  # fmt: skip


def matched_at(text, source, i):
    """How many tokens before `i` in the source are the last ones of the text."""
    n = 0
    while n < min(i, len(text)) and source[i - 1 - n] == text[-1 - n]:
        n += 1
    return n


def by_hand(text, source, drafter):
    """The best draft and its score; of equal tokens that of the longest, then latest match wins."""
    best = ([], 0.0)
    for n in range(min(drafter.max_suffix, len(text)), 0, -1):
        lengths = {i: matched_at(text, source, i) for i in range(1, len(source) + 1)}
        left = [i for i in lengths if lengths[i] >= n]
        left.sort(key=lambda i: (-min(lengths[i], drafter.max_suffix), -i))
        drafted, probability, score = [], 1.0, 0.0
        for j in range(min(drafter.num_drafts, int(drafter.factor * n + drafter.offset))):
            nexts = [source[i + j] for i in left if i + j < len(source) and source[i + j] >= 0]
            if not nexts:
                break
            most = max(map(nexts.count, nexts))
            token = next(t for t in nexts if nexts.count(t) == most)
            probability *= most / len(left)
            if probability < drafter.min_probability - 1e-6:
                break
            drafted.append(token)
            score += probability
            left = [i for i in left if i + j < len(source) and source[i + j] == token]
        if score > best[1] + 1e-6:
            best = (drafted, score)
    return best


@pytest.mark.parametrize("seed", [0, *more(1, 2, 3)])
@pytest.mark.parametrize("with_corpus", [False, True])
def test_drafts_are_those_of_counts(seed, with_corpus):
    """Few tokens, so that there are many occurrences."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 3, rng.integers(2, 40)).tolist() for _ in range(20)]
    corpus = None
    if with_corpus:
        corpus = [*rng.integers(0, 3, 30).tolist(), -1, *rng.integers(0, 3, 30).tolist()]
    drafter = Suffix(
        jnp.asarray(corpus, jnp.int32) if with_corpus else None, num_drafts=6, max_suffix=5,
        factor=1.0 + seed % 2, num_places=200, min_probability=0.13 * (1 + seed),
    )  # fmt: skip
    tree = as_one_program(drafter.propose)(None, context_of(rows), ()).tree
    from_corpus = 0
    for b, row in enumerate(rows):
        count = int(tree.is_valid[b].sum()) - 1
        expected, score = by_hand(row, row, drafter)
        if with_corpus:
            other, highest = by_hand(row, corpus, drafter)
            if highest > score + 1e-6:
                expected, from_corpus = other, from_corpus + 1
        assert np.asarray(tree.tokens[b, 1 : count + 1]).tolist() == expected
    assert from_corpus > 5 or not with_corpus


def test_an_exact_repetition_is_drafted_whole():
    part = [7, 3, 9, 4, 8, 2, 6]
    propose = as_one_program(Suffix(num_drafts=8, min_probability=0.1).propose)
    tree = propose(None, context_of([[*part, *part[:4]], [5, 6, 7]]), ()).tree
    # Of two places one goes on, so the first token has 1/2, as do the others.
    assert int(tree.is_valid[0].sum()) == 1 + 4
    assert tree.tokens[0, 1:5].tolist() == [8, 2, 6, 7][:4] and not tree.is_valid[1, 1:].any()


def test_match_lengths():
    tokens = jnp.asarray([[1, 2, 1, 2, 1, 0], [4, 4, 4, 0, 0, 0]])
    length = jnp.asarray([5, 3])
    found = match_lengths(tokens, tokens, length, 3)
    assert found[0, :5].tolist() == [1, 0, 3, 0, 3] and found[1, :3].tolist() == [1, 2, 3]


def test_settings_that_make_no_sense_are_refused(toy_cfg):
    for drafter, message in (
        (Suffix(num_drafts=0), "num_drafts=0"),
        (Suffix(min_probability=1.5), r"min_probability=1.5 must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            SpeculativeMethod(drafter).validate(toy_cfg)
