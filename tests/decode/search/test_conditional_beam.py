"""Conditional beams: modes by enumeration, beams by hand with a head, and what texts lack."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from decode.search.components import METHODS, Beam, ConditionalBeam
from decode.search.contracts import NEVER, Texts
from decode.search.loop import SearchMethod, decode
from decode.search.strategies.conditional_beam import LACKS, NO_END, Attribute, Length
from dlm import vocab
from dlm.heads.length import LengthHead, bucket_starts, log_buckets, log_within
from tests.lib.docs import check_refusals
from tests.lib.heads import init
from tests.lib.jitted import as_one_program
from tests.lib.models import hidden_of, markov
from tests.lib.search import ending, found, search
from tests.lib.tiers import more

# ---- All texts of a tiny model ------------------------------------------------------------------

V, EOS, LONGEST = 4, 3, 4
TABLE = np.array(
    [[0.1, 0.35, 0.15, 0.4], [0.3, 0.1, 0.1, 0.5], [0.6, 0.2, 0.1, 0.1], [0.25] * 4], np.float64
)
PROMPTS = [[0], [1, 2], [2, 0, 1]]
WORDS = [
    text for n in range(LONGEST + 1) for text in itertools.product(range(V - 1), repeat=n)
]  # prefixes that have not ended


def code(text):
    return sum(token * V**i for i, token in enumerate(text))


def log_p(prompt, text):
    steps = itertools.pairwise((prompt[-1], *text))
    return sum(np.log(TABLE[a, b]) for a, b in steps)


def future(last, text, has):
    """P(the text ends within its longest length, and has it), by enumeration."""
    if text and text[-1] == EOS:
        return float(has(text))
    if len(text) == LONGEST:
        return 0.0
    return sum(TABLE[last, v] * future(v, (*text, v), has) for v in range(V))


@struct.dataclass
class Exact(Attribute):
    """An attribute whose q is known.

    Attributes:
      log_q: [n, V^n] float32. By the length of a prefix, and its code.
      has: [n, V^n] bool. Whether a text of such words has it that ends behind them.
    """

    log_q: jax.Array
    has: jax.Array

    @classmethod
    def of(cls, has):
        """Whose q does not depend on the prompt, as a token of the text is the last one."""
        log_q = np.full((LONGEST + 1, V**LONGEST), LACKS, np.float32)
        holds = np.zeros(log_q.shape, bool)
        for text in WORDS:
            if text and (q := future(text[-1], text, has)) > 0:
                log_q[len(text), code(text)] = np.log(q)
            holds[len(text), code(text)] = has((*text, EOS))
        return cls(jnp.asarray(log_q), jnp.asarray(holds))

    def log_prob(self, seen, tokens):
        texts = seen.texts()
        n = texts.num_tokens[:, None, None]
        codes = self._codes(texts)[:, :, None] + tokens * V**n
        return self.log_q[n + 1, jnp.minimum(codes, V**LONGEST - 1)]

    def holds(self, texts, has_ended):
        n = jnp.minimum(texts.num_tokens, LONGEST)[:, None]
        return self.has[n, self._codes(texts)] & has_ended

    def _codes(self, texts):
        i = jnp.arange(texts.tokens.shape[2])[None, None]
        is_written = i < texts.num_tokens[:, None, None]
        return jnp.where(is_written, texts.tokens * V**i, 0).sum(axis=2)


ATTRIBUTES = {
    "two ones": lambda text: text.count(1) == 2,
    **{f"{n} tokens": lambda text, n=n: len(text) == n for n in range(1, LONGEST + 1)},
    **{"not empty": lambda text: len(text) > 1, "none": lambda text: False},
}


def modes(attribute, num_beams):
    """What is found for the prompts, and its score."""
    params, cfg = markov(TABLE)
    made = ConditionalBeam(attribute, num_beams=num_beams, num_tried=V, floor=1e-30)
    _, ours = search(
        (dataclasses.replace(cfg, eos_token_id=EOS), params, PROMPTS), SearchMethod(made),
        gen_len=LONGEST, prompt_len=4, canvas_len=LONGEST, batch_size=4,
    )  # fmt: skip
    return [(found(ours, b), ours.score[b, 0]) for b in range(3)]


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_modes_are_those_of_all_texts(name):
    """As many beams as there are prefixes; where no text has it, the best that lacks it."""
    has = ATTRIBUTES[name]
    every = [(*text, EOS) for text in WORDS if len(text) < LONGEST]
    cut = [text for text in WORDS if len(text) == LONGEST]
    for prompt, (text, score) in zip(PROMPTS, modes(Exact.of(has), 27), strict=True):
        having = [x for x in every if has(x)]
        best = max(having or [*every, *cut], key=lambda x: log_p(prompt, x))
        assert text == list(best)
        np.testing.assert_allclose(score, log_p(prompt, best) + (0 if having else LACKS), rtol=1e-5)


def test_exact_futures_lead_one_beam_to_every_length():
    for n in range(1, LONGEST + 1):
        for text, score in modes(Exact.of(ATTRIBUTES[f"{n} tokens"]), 1):
            assert len(text) == n and text[-1] == EOS and score > LACKS / 2


def test_a_future_that_is_told_too_low_ends_nothing():
    """Of text "0 end" it says 0.6 times 0.05 beforehand, less than the 0.1 of an empty text."""
    all_have = Exact.of(lambda text: True)
    text, score = modes(all_have.replace(log_q=all_have.log_q - 3), 1)[1]
    assert text == [0, EOS]
    np.testing.assert_allclose(score, np.log(0.6 * 0.4), rtol=1e-5)


# ---- By hand, with a head -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    cfg, prompts = ending(toy_cfg, toy_params)
    return cfg, toy_params, prompts


@pytest.fixture(scope="module")
def own(toy):
    """A head that is sure of something."""
    fresh = init(LengthHead(d_hidden=8, num_buckets=5), toy[0])
    return fresh | {"v": 8 * fresh["v"]}


@pytest.fixture(scope="module")
def futures(toy, own):
    """log P of the buckets behind a text and each token: [V, N] float64; the text's law, too."""
    cfg, params, _ = toy
    head = np.asarray(vocab.head(params), np.float64)
    buckets = jax.jit(log_buckets)

    @functools.cache
    def of(tokens):
        hidden = hidden_of(params, cfg, tokens)[-1]
        z = head @ hidden
        log_probs = z - z.max() - np.log(np.exp(z - z.max()).sum())
        return log_probs, np.asarray(buckets(own, hidden[None], params["embed"]), np.float64)

    return of


def within(log_probs, low, high):
    """log P(low <= r <= high), length by length."""
    bounds, total = bucket_starts(len(log_probs)), 0.0
    for j, log in enumerate(log_probs):
        lengths = range(bounds[j], bounds[j + 1])
        total += np.exp(log) * sum(low <= r <= high for r in lengths) / len(lengths)
    return np.log(total) if total else -np.inf


def by_hand(futures, prompt, m, gen_len, eos):
    """As the card says: (score, tokens), the best first."""
    K, a = m.num_beams, m.attribute
    alive, aside = [(0.0, 0.0, ())], []
    for n in range(1, gen_len + 1):
        every, reach = [], -np.inf
        for _, lp, text in alive:
            log_probs, buckets = futures((*prompt, *text))
            tried = np.argsort(-log_probs, kind="stable")[: m.num_tried]
            for v in {*map(int, tried), eos}:
                if v == eos:
                    q = 0.0 if a.least <= n <= a.most else LACKS
                elif a.most - n < 1:
                    q = LACKS
                else:
                    q = within(buckets[v], max(a.least - n, 1), a.most - n)
                    q = m.weight * max(q, np.log(m.floor))
                total = lp + log_probs[v]
                reach = max(reach, total + (q if q == LACKS else 0))
                every.append((total + q, total, (*text, v)))
        every = sorted(every, key=lambda x: -x[0])[: 2 * K]
        aside += [(s, text) for s, _, text in every[:K] if text[-1] == eos]
        aside = sorted(aside, key=lambda x: -x[0])[:K]
        alive = [x for x in every if x[2][-1] != eos][:K]
        if len(aside) == K and aside[-1][0] >= reach:
            return aside
    lacks = 0.0 if a.least <= gen_len and a.most >= NO_END else LACKS
    return sorted(aside + [(lp + lacks, text) for _, lp, text in alive], key=lambda x: -x[0])[:K]


SHAPES = dict(prompt_len=13, canvas_len=10, batch_size=8)


def method_of(own, *, weight=1.0, floor=1e-4, **lengths):
    made = ConditionalBeam(Length(**lengths, own=own), 3, 8, weight, floor)
    return SearchMethod(made, num_return=3)


@pytest.mark.parametrize(
    "lengths",
    [dict(least=5, most=5), dict(most=4), *more(dict(least=6), dict(least=3, most=7), dict())],
)
def test_beams_by_hand(toy, own, futures, lengths):
    method = method_of(own, **lengths)
    _, ours = search(toy, method, gen_len=7, **SHAPES)
    has = 0
    for b, prompt in enumerate(toy[2]):
        expected = by_hand(futures, tuple(prompt), method.strategy, 7, toy[0].eos_token_id)
        assert [found(ours, b, r) for r in range(3)] == [list(text) for _, text in expected]
        np.testing.assert_allclose(ours.score[b], [s for s, _ in expected], atol=0.02)
        # What has the attribute is worth its log-probability.
        for r in range(3):
            if ours.score[b, r] > LACKS / 2:
                log_prob = ours.log_prob[b, r, : ours.num_tokens[b, r]].sum()
                np.testing.assert_allclose(ours.score[b, r], log_prob, rtol=1e-5)
                has += 1
    assert has > 8


def test_a_future_that_is_certain_is_plain_beams(toy, own):
    """A weight of 0; other numbers compile nothing."""
    _, plain = search(toy, SearchMethod(Beam(3, 0.0), num_return=3), gen_len=7, **SHAPES)
    size = decode._cache_size()
    _, ours = search(toy, method_of(own, weight=0.0, least=1), gen_len=7, **SHAPES)
    other = method_of(own, weight=0.7, floor=0.1, least=2, most=6)
    search(toy, other, gen_len=7, **SHAPES)
    assert decode._cache_size() <= size + 1
    for b in range(8):
        assert [found(ours, b, r) for r in range(3)] == [found(plain, b, r) for r in range(3)]
    np.testing.assert_allclose(ours.score, plain.score, rtol=1e-5)


@pytest.mark.exhaustive
def test_the_named_point_writes_no_empty_text():
    """Of a model that would rather say nothing."""
    table = np.array([[0.2, 0.2, 0.6], [0.3, 0.1, 0.6], [0.3, 0.3, 0.4]])
    params, cfg = markov(table)
    toy = dataclasses.replace(cfg, eos_token_id=2), params, [[0], [1, 0]]
    _, plain = search(toy, SearchMethod(Beam(5, 0.0)), gen_len=4)
    _, ours = search(toy, METHODS["conditional_beam_5"], gen_len=4)
    assert [found(plain, b) for b in range(2)] == [[2]] * 2
    assert [found(ours, b) for b in range(2)] == [[0, 2]] * 2


# ---- Parts --------------------------------------------------------------------------------------


def test_lengths_that_are_possible():
    """Without a head, a length is impossible or it is not; text that is cut has no length."""
    texts = Texts(None, None, jnp.array([1, 4]), jnp.zeros((2, 3)))
    holds = lambda has_ended, **lengths: (
        Length(**lengths).holds(texts, has_ended)[:, 0].tolist()
    )  # fmt: skip
    assert holds(True) == [True, True] and holds(True, least=3) == [False, True]
    assert holds(True, least=5, most=5) == [False, True]
    assert holds(True, least=1, most=4) == [True, False]
    assert holds(False, least=2) == [False, True] and holds(False, most=9) == [False, False]


def test_shares_of_buckets():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(6), 9)).astype(np.float32)  # up to 11
    low, high = np.int32([[1, 1, 5, 4, 8, 11, 7, 2, 9], [1, 11, 5, 9, 11, 11, 8, 99, 10]])
    ours = as_one_program(log_within)(log_probs, low, high)
    expected = [within(*args) for args in zip(log_probs, low, high, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    beyond = as_one_program(log_within)(log_probs, low + 20, high + NO_END // 2)
    np.testing.assert_allclose(beyond, log_probs[:, 5] - np.log(4), rtol=1e-4)  # its last length


def test_nonsense_is_refused(toy, own):
    cfg = toy[0]
    check_refusals(ConditionalBeam(), lambda made: SearchMethod(made).validate(cfg), cfg)
    check_refusals(Length(), lambda made: SearchMethod(ConditionalBeam(made)).validate(cfg), cfg)
    for made, message in (
        (ConditionalBeam(Beam()), "must be of class Attribute"),
        (ConditionalBeam(Length(5, 4)), "most=4 must be at least least=5"),
        (ConditionalBeam(num_beams=8, num_tried=15), "must be at least twice num_beams=8"),
        (
            ConditionalBeam(Length(own=own | {"w": own["w"][:3]})),
            "own is of a model with d_model=3, which must be 16",
        ),
        (ConditionalBeam(Length(own={"w": own["w"]})), "own has no 'b': it must be what dlm.heads"),
        (ConditionalBeam(weight=np.inf), "weight=inf must be finite and at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SearchMethod(made).validate(cfg)
    assert NEVER < LACKS < -1e4
