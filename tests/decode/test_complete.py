"""The notebook API: strings, stop strings, seeds, and what is reported."""

import dataclasses
import inspect

import numpy as np
import pytest

import dlm
from decode.complete import choose, complete, stream_text
from decode.core.sampling import FILTERS, Sampling
from decode.core.texts import MethodOptions
from decode.generate import choose as choose_diffusion
from decode.generate import generate
from decode.search.astar import AStar
from decode.search.components import CNTP, Beam
from decode.search.loop import SearchMethod
from decode.search.pg_td import PGTD
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.swift import Swift
from decode.speculative.loop import SpeculativeMethod
from tests.lib.untrained import byte_lm


@pytest.fixture(scope="module")
def lm():
    return byte_lm()


def test_drafts_change_the_forwards_and_nothing_else(lm):
    plain = complete(lm, ["abc", "to be or not to be", "x"], gen_len=[30, 20, 25])
    fast = complete(
        lm, ["abc", "to be or not to be", "x"], gen_len=[30, 20, 25], drafter=PromptLookup()
    )
    for a, b in zip(plain, fast, strict=True):
        assert a.text == b.text and a.tokens.tolist() == b.tokens.tolist()
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.log_prob, b.log_prob, atol=1e-5)
        assert a.mean_acceptance_length == 1.0 <= b.mean_acceptance_length
        assert a.num_forwards == len(a.canvas) >= b.num_forwards
    assert sum(b.num_forwards for b in fast) < sum(a.num_forwards for a in plain)


def test_one_prompt_gives_one_answer_and_token_ids_will_do(lm):
    ids = lm.tokenizer.encode("hello")
    assert complete(lm, ids, gen_len=5).text == complete(lm, "hello", gen_len=5).text


def test_texts_are_cut_before_stop_strings(lm):
    whole = complete(lm, "abc", gen_len=40)
    for first in (1, 7, 20):
        stop = whole.text[first : first + 2]
        cut = complete(lm, "abc", gen_len=40, stop=["never there", stop])
        assert cut.text == whole.text[: whole.text.index(stop)]
        assert cut.finish_reason == "stop" and cut.num_forwards <= whole.num_forwards
        assert len(lm.tokenizer.decode(cut.tokens.tolist())) >= len(cut.text)


def test_a_special_token_can_be_a_stop_string(lm):
    """It is not in the text, so it must be looked for elsewhere."""
    stop, token = "<|startoftext|>", 257
    answer = complete(lm, "abc", gen_len=40, stop=stop, logit_bias={token: 100.0})
    assert (answer.text, answer.finish_reason) == ("", "stop") and len(answer.tokens) == 0
    assert answer.num_forwards < 40 and answer.canvas[0] == token


def test_stop_ids_and_lengths(lm):
    whole = complete(lm, "abc", gen_len=12)
    assert whole.finish_reason == "length" and len(whole.tokens) == 12
    stop = int(whole.tokens[5])
    cut = complete(lm, "abc", gen_len=12, stop_ids=[stop])
    first = whole.tokens.tolist().index(stop)
    assert cut.finish_reason == "eos" and cut.tokens.tolist() == whole.tokens[:first].tolist()


def test_every_end_of_the_model_ends_a_text(lm):
    """Each of several ids, with and without drafts; the first that comes up does."""
    whole = complete(lm, "abc", gen_len=40).tokens.tolist()
    firsts = [token for i, token in enumerate(whole) if token not in whole[:i]]
    assert len(firsts) > 4
    cfg = dataclasses.replace(lm.cfg, more_eos_ids=(firsts[4], firsts[2]))
    for drafter in (None, PromptLookup()):
        cut = complete(dataclasses.replace(lm, cfg=cfg), "abc", gen_len=40, drafter=drafter)
        assert cut.finish_reason == "eos" and cut.canvas[-1] == firsts[2]
        assert cut.tokens.tolist() == whole[: whole.index(firsts[2])]


def test_seeds_are_per_prompt(lm):
    both = complete(lm, ["abc", "abc"], gen_len=12, temperature=1.0, top_p=0.9, seed=[2, 4])
    assert both[0].text != both[1].text
    again = complete(lm, "abc", gen_len=12, temperature=1.0, top_p=0.9, seed=4)
    assert again.text == both[1].text


def test_filters_are_those_of_sampling(lm):
    """One that leaves a single token has the greedy text drawn; all are options everywhere."""
    greedy = complete(lm, "abc", gen_len=12)
    drawn = complete(lm, "abc", gen_len=12, temperature=1.0, epsilon_cutoff=0.99, seed=3)
    assert drawn.canvas.tolist() == greedy.canvas.tolist()
    assert MethodOptions.__optional_keys__ >= {*FILTERS}
    for function in (complete, generate):
        assert inspect.signature(function).parameters.keys() >= {*FILTERS}
    given = dict.fromkeys(FILTERS, 0.5) | {"top_k": 3}
    for chosen in (
        choose(lm, {"temperature": 1.0, **given}).sampling,
        choose_diffusion(lm, 8, given).constraint.sampling,
    ):
        assert {name: getattr(chosen, name) for name in FILTERS} == given


def test_what_is_given_replaces_that_and_no_more(lm):
    """Of what a method draws from, by a drafter, a search and a search on the host."""
    own = Sampling(0.8, top_p=0.9)
    for method in (
        SpeculativeMethod(sampling=own),
        SearchMethod(CNTP(2), own),
        AStar(sampling=own),
        PGTD(reward=len, mode="sample", sampling=own),
    ):
        for given, expected in (
            ({"top_k": 5}, own.replace(top_k=5)),
            ({"temperature": 0.5}, own.replace(temperature=0.5)),
            ({"temperature": 0}, own.replace(temperature=None)),
            (
                {"top_p": 0.5, "repetition_penalty": 1.2},
                Sampling(0.8, top_p=0.5, repetition_penalty=1.2),
            ),
            ({}, own),
        ):
            assert choose(lm, {"method": method, **given}).sampling == expected


def test_a_penalty_counts_the_drafts_too(lm):
    """Greedy with a large penalty never repeats a token, and drafts do not change that."""
    options = dict(gen_len=20, repetition_penalty=1e4)
    plain = complete(lm, "to be or not to be", **options)
    assert len(set(plain.canvas.tolist())) == 20
    fast = complete(lm, "to be or not to be", drafter=PromptLookup(), **options)
    assert fast.canvas.tolist() == plain.canvas.tolist()


def test_bad_options_are_refused(lm):
    nameless = dlm.LanguageModel(lm.params, lm.cfg, None)
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer: use stop_ids"):
        complete(nameless, [1, 2], stop="x")
    with pytest.raises(ValueError, match="stop has an empty string"):
        complete(lm, "abc", stop="")
    with pytest.raises(ValueError, match="top_p=2 must be in"):
        complete(lm, "abc", gen_len=4, temperature=1.0, top_p=2.0)
    with pytest.raises(ValueError, match=r"typical_p=0 must be in \(0, 1\]"):
        list(stream_text(lm, "abc", gen_len=4, temperature=1.0, typical_p=0.0))
    with pytest.raises(TypeError, match="prompts is a int"):
        complete(lm, 5)
    for options, message in (
        (dict(top_k=1.5), "top_k=1.5 must be a whole number"),
        (dict(drafter=Swift(seed=2**31)), f"seed={2**31} must be a number of 32 bits, signed"),
        (dict(temperature=[1.0]), r"temperature=\[1.0\] must be a number"),
        (
            dict(method=5),
            "method=5 must be a SpeculativeMethod or a SearchMethod, or the name of one",
        ),
        (dict(method="beam_5"), "there is no method 'beam_5'; close: beam_4"),
        (dict(method="beam_4", num_return=0), "num_return=0 must be at least 1"),
        (dict(method=SearchMethod(Beam(), stop_ids=(1.5,))), "an entry of stop_ids=1.5 must be a"),
        (dict(method=SearchMethod(CNTP())), "temperature must be positive: CNTP draws"),
        (dict(method="a_star", temperature=0), "temperature must be positive: AStar draws"),
        (dict(drafter="prompt_lookup"), "drafter='prompt_lookup' must be of class Drafter"),
        (dict(acceptance=5), "acceptance=5 must be of class AcceptanceRule"),
        (dict(controller=True), "controller=True must be of class Controller"),
        (dict(logit_bias=[1]), r"logit_bias=\[1\] must map token ids to numbers"),
        (dict(logit_bias={"a": 1}), "a token of logit_bias='a' must be a whole number"),
        (dict(logit_bias={1.5: 1}), "a token of logit_bias=1.5 must be a whole number"),
        (dict(logit_bias={1: "x"}), "logit_bias of token 1='x' must be a number"),
        (dict(logit_bias={1: float("nan")}), "logit_bias of token 1=nan must be finite, or -inf"),
        (dict(logit_bias={1: float("inf")}), "logit_bias of token 1=inf must be finite, or -inf"),
        (dict(seed=2**64), f"seed={2**64} of prompt 0 must be a number of 64 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            complete(lm, "abc", gen_len=4, **options)


def test_the_most_probable_tokens_are_reported(lm):
    """They are the model's, the same with drafts and filters; the first is what greedy writes."""
    plain = complete(lm, ["abc", "to be or not to be"], gen_len=12, top_logprobs=3)
    fast = complete(lm, ["abc", "to be or not to be"], gen_len=12, top_logprobs=3,
                    drafter=PromptLookup(), repetition_penalty=1.0)  # fmt: skip
    for a, b in zip(plain, fast, strict=True):
        assert a.top.tokens.shape == (len(a.canvas), 3)
        assert a.top.tokens[:, 0].tolist() == a.canvas.tolist()
        np.testing.assert_allclose(a.top.log_probs[:, 0], a.log_prob, rtol=1e-6, atol=1e-6)
        assert (np.diff(a.top.log_probs, axis=1) <= 0).all()
        assert a.top.tokens.tolist() == b.top.tokens.tolist()
        np.testing.assert_allclose(a.top.log_probs, b.top.log_probs, atol=1e-5)
    with pytest.raises(ValueError, match="top_logprobs=-1 must be in"):
        complete(lm, "abc", gen_len=4, top_logprobs=-1)
    assert complete(lm, "abc", gen_len=4).top is None
