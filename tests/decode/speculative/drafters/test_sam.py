"""Suffix automata on the device and on the host, against searches in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.speculative.contracts import Context
from decode.speculative.drafters.automaton import build_corpus, empty, extend, follow
from decode.speculative.drafters.sam import SAM
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more

V, S = 5, 40


def longest(text, source):
    """The longest suffix of a text that stands in a source, and where it first ends."""
    for n in range(len(text), 0, -1):
        suffix = text[-n:]
        for end in range(n - 1, len(source)):
            if source[end - n + 1 : end + 1] == suffix:
                return n, end
    return 0, 0


def random_texts(rng, num, most=S):
    """Of few tokens, so that much comes up again; some of one token, some of none."""
    high = rng.integers(1, V + 1, num)
    return [rng.integers(0, high[b], rng.integers(0, most + 1)).tolist() for b in range(num)]


def padded(texts):
    tokens = np.full((len(texts), S), V - 1, np.int32)
    for b, text in enumerate(texts):
        tokens[b, : len(text)] = text
    return jnp.asarray(tokens), jnp.asarray([len(text) for text in texts], jnp.int32)


@as_one_program
def read(tokens, lengths):
    """After every token: the longest suffix that has ended before, and where; the automata."""

    def step(text, i):
        text = extend(text, tokens[:, i], i < lengths)
        rows = jnp.arange(len(lengths))
        shorter = text.automaton.link[rows, text.last]
        return text, (text.automaton.length[rows, shorter], text.automaton.end[rows, shorter])

    return jax.lax.scan(step, empty(len(lengths), S, V), jnp.arange(S))


@pytest.mark.parametrize("seed", [0, *more(*range(1, 20))])
def test_the_longest_suffix_that_came_up_before(seed):
    texts = random_texts(np.random.default_rng(seed), 60)
    text, found = read(*padded(texts))
    found = np.stack(found, axis=2)  # [S, B, 2]
    for b, row in enumerate(texts):
        for i in range(len(row)):
            n, end = longest(row[: i + 1], row[:i])
            assert found[i, b, 0] == n and (n == 0 or found[i, b, 1] == end), (row, i)
    lengths = np.array([len(row) for row in texts])
    assert (text.num_read == lengths).all()
    assert (text.num_states <= np.maximum(2 * lengths - 2, lengths)).all()
    edges = text.num_edges + (text.automaton.root > 0).sum(axis=1)
    assert (edges <= np.maximum(3 * lengths - 4, 2 * lengths)).all()


@pytest.mark.parametrize("seed", [0, *more(*range(1, 20))])
def test_the_longest_suffix_that_a_corpus_knows(seed):
    rng = np.random.default_rng(seed)
    corpus = [[0], *random_texts(rng, 4, most=30)]
    built = build_corpus(corpus, V)
    source = np.asarray(built.tokens).tolist()
    assert source == [token for text in corpus for token in (*text, -1)]

    @as_one_program
    def search(tokens, lengths):
        def step(carry, i):
            carry = follow(built.automaton, *carry, tokens[:, i], i < lengths)
            return carry, (carry[1], built.automaton.end[0, carry[0]])

        zeros = jnp.zeros_like(lengths)
        return jax.lax.scan(step, (zeros, zeros), jnp.arange(S))[1]

    texts = random_texts(rng, 20)
    found = np.stack(search(*padded(texts)), axis=2)
    for b, row in enumerate(texts):
        for i in range(len(row)):
            n, end = longest(row[: i + 1], source)
            assert found[i, b, 0] == n and (n == 0 or found[i, b, 1] == end)
        assert (found[len(row) :, b] == found[len(row) - 1, b]).all()


def proposal(drafter, *texts):
    tokens, lengths = padded(texts)
    context = Context(
        params={}, tokens=tokens, length=lengths, key=jnp.zeros((len(texts), 2), jnp.uint32),
        sampling=Sampling(None), active=jnp.ones(len(texts), bool), cache=None,
    )  # fmt: skip

    def propose(drafter, context):
        return drafter.propose(None, context, drafter.init(_Sizes, len(texts), S))

    made = as_one_program(propose)(drafter, context)
    count = np.asarray(made.tree.is_valid).sum(axis=1)
    drafts = [np.asarray(made.tree.tokens)[b, 1:n].tolist() for b, n in enumerate(count)]
    return drafts, np.asarray(made.grade).tolist()


class _Sizes:
    vocab_size = V


def test_what_stood_behind_the_longest_match_is_drafted():
    """To the end of the text; the first place counts. A grade per token that agrees."""
    drafter = SAM(num_drafts=3)
    drafts, grades = proposal(drafter, [1, 2, 3, 0, 2, 3, 1, 2], [3, 0, 3], [0, 1, 2], [4] * 12)
    assert drafts == [[3, 0, 2], [0, 3], [], [4]] and grades == [1, 0, 0, 7]
    drafts, _ = proposal(SAM(num_drafts=3, min_match=2), [1, 2, 3, 0, 2, 3, 1, 2], [3, 0, 3])
    assert drafts == [[3, 0, 2], []]


def test_the_corpus_drafts_where_it_knows_more():
    """Longer by more than the margin; no draft goes beyond a text."""
    corpus = build_corpus([[2, 3, 1, 4, 4], [0, 1, 2, 3, 1]], V)
    texts = [[0, 2, 3, 1], [2, 4, 0, 1, 2]]
    assert proposal(SAM(num_drafts=3, corpus_margin=2), *texts)[0] == [[], [4, 0, 1]]
    for margin, expected in ((1, [[4, 4], [3, 1]]), (2, [[4, 4], [4, 0, 1]]), (3, [[], [4, 0, 1]])):
        drafter = SAM(corpus, num_drafts=3, corpus_margin=margin)
        assert proposal(drafter, *texts)[0] == expected


def test_corpora_that_make_no_sense_are_refused(toy_cfg):
    for texts, message in (
        ([], "0 texts and no token"),
        ([[1, V]], r"5, not in \[0, vocab_size=5"),
    ):
        with pytest.raises(ValueError, match=message):
            build_corpus(texts, V)
    with pytest.raises(ValueError, match="a vocabulary of 5 tokens and the target has"):
        SAM(build_corpus([[1]], V)).validate(toy_cfg)
