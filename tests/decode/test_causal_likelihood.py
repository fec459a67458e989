"""Exact log-likelihoods against laws of single texts, their independence, refusals."""

import dataclasses

import numpy as np
import pytest

from decode.causal_likelihood import _score, causal_log_likelihood
from dlm.lm import LanguageModel
from dlm.sharding import make_mesh
from tests.lib.models import laws_of
from tests.lib.untrained import byte_lm

PAIRS = [([3, 1, 4, 1, 5], [9, 2, 6]), ([7], [8]), ([2] * 20, [11] * 17), ([5, 6], [1, 2])]


@pytest.fixture(scope="module")
def lm(toy_cfg, toy_params):
    return LanguageModel(toy_params, toy_cfg)


def by_laws(lm, prompt, answer):
    """The log-likelihood and the most probable token at each place, in float64."""
    laws = laws_of(lm.params, lm.cfg, [*prompt, *answer])[len(prompt) - 1 : -1]
    return np.log(laws[range(len(answer)), answer]).sum(), laws.argmax(axis=1).tolist()


def test_sums_are_those_of_the_laws(lm):
    found = causal_log_likelihood(lm, PAIRS, batch_size=3)
    for (prompt, answer), one in zip(PAIRS, found, strict=True):
        total, best = by_laws(lm, prompt, answer)
        np.testing.assert_allclose(one.log_prob, total, rtol=1e-5)
        assert one.num_tokens == len(answer) and one.is_greedy == (best == answer)


def test_greedy_is_every_token_of_the_answer(lm):
    prompt, answer = [3, 1, 4], []
    for _ in range(5):
        answer.append(by_laws(lm, prompt, [*answer, 0])[1][-1])
    wrong_first = [(answer[0] + 1) % 20, *answer[1:]]
    wrong_last = [*answer[:-1], (answer[-1] + 1) % 20]
    pairs = [(prompt, answer), (prompt, wrong_first), (prompt, wrong_last), (prompt[:1], answer)]
    flags = [one.is_greedy for one in causal_log_likelihood(lm, pairs[:3], batch_size=3)]
    assert flags == [True, False, False]
    (one,) = causal_log_likelihood(lm, pairs[3:], batch_size=3)  # not what stands before it
    assert one.is_greedy == (by_laws(lm, prompt[:1], answer)[1] == answer)


def test_results_do_not_depend_on_other_pairs(lm):
    together = causal_log_likelihood(lm, PAIRS, batch_size=3)
    alone = [causal_log_likelihood(lm, [pair], batch_size=3)[0] for pair in PAIRS]
    assert alone == together
    assert causal_log_likelihood(lm, PAIRS[::-1], batch_size=3) == together[::-1]
    assert causal_log_likelihood(lm, []) == []


def test_the_last_token_needs_no_place(lm):
    """A model of 39 positions judges 40 tokens, and is asked for one program per bucket."""
    lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, max_seq_len=39))
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(0, 20, 10).tolist(), rng.integers(0, 20, 30).tolist()
    size = _score._cache_size()
    (one,) = causal_log_likelihood(lm, [(prompt, answer)], batch_size=1)
    np.testing.assert_allclose(one.log_prob, by_laws(lm, prompt, answer)[0], rtol=1e-5)
    causal_log_likelihood(lm, [([4] * 15, [9] * 24)], batch_size=1)
    assert _score._cache_size() == size + 1
    with pytest.raises(ValueError, match=r"pair 0 has 11 \+ 30 tokens, of which all but the last"):
        causal_log_likelihood(lm, [([1, *prompt], answer)])


def test_text_is_cut_where_the_prompt_ends():
    lm = byte_lm()
    pairs = [("ab  ", "c"), ("ab", "  c"), ([97, 98], [32, 32, 99])]
    one, two, ids = causal_log_likelihood(lm, pairs, batch_size=3)
    assert one == two == ids and one.num_tokens == 3


def test_nonsense_is_refused(lm):
    for pair, message in (
        (([], [1]), "the prompt of pair 1 has 0 tokens"),
        (([1], []), "the answer of pair 1 has 0 tokens"),
        (([1], [24]), "the answer of pair 1 contains token 24"),
        (([23], [1]), "the prompt of pair 1 contains the mask token 23"),
        (("a", "b"), "pair 1 is text but the checkpoint has no tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_log_likelihood(lm, [PAIRS[0], pair])
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        causal_log_likelihood(lm, PAIRS, batch_size=0)
    never = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, never_causal=True))
    with pytest.raises(ValueError, match="never learned to read from left to right"):
        causal_log_likelihood(never, PAIRS)


@pytest.mark.exhaustive
def test_a_mesh_changes_nothing(lm):
    on_mesh = dataclasses.replace(lm, mesh=make_mesh(data=2, tensor=2))
    one, split = (causal_log_likelihood(x, PAIRS[:1], batch_size=4) for x in (lm, on_mesh))
    np.testing.assert_allclose(one[0].log_prob, split[0].log_prob, rtol=1e-5)
