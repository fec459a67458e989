"""What harnesses ask, answered: order, batches, restarts, stop strings, cuts, likelihoods."""

import contextlib
import copy
import dataclasses
import json
import math
import sys

import numpy as np
import pytest

from decode.causal_likelihood import causal_log_likelihood
from decode.complete import complete
from decode.evaluation.harness import Answerer
from decode.evaluation.record import Record
from decode.evaluation.requests import read_settings, render_chat, rolling_windows
from decode.generate import generate
from decode.likelihood import greedy_match, log_likelihood
from dlm.chat import Rendered
from dlm.tokenizer import frame
from tests.lib.untrained import byte_lm, char_lm

SAMPLED = {"until": [], "do_sample": True, "temperature": 5.0}
CONTEXTS = ["hello there", "a", "b, c? d!", "one two three", "hello there"]
METHODS = ["prompt_lookup", "threshold"]  # one of each loop


@pytest.fixture(scope="module")
def lm():
    """A model of characters that both loops can use, with a short window."""
    lm = char_lm()
    return dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, max_seq_len=64))


def answerer(lm, **changes):
    return Answerer(**{"lm": lm, "gen_len": 12, "batch_size": 2, "num_samples": 4} | changes)


# ---- Texts


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_those_of_the_loop(lm, method):
    """Seeds come from requests: the same asked twice is drawn twice, arg-max is one text."""
    decode = complete if method == "prompt_lookup" else generate
    expected = decode(lm, CONTEXTS, method=method, gen_len=12, batch_size=2)
    one = answerer(lm, method=method)
    settings = {"until": []}
    assert one.generate([(c, settings) for c in CONTEXTS]) == [a.text for a in expected]
    about = one.about()
    assert about["answers"] == 5 and about["prompts_cut"] == 0
    assert about["tokens"] == sum(len(answer.tokens) for answer in expected)
    assert about["forwards"] == sum(answer.num_forwards for answer in expected)
    drawn = one.generate([("hello there", SAMPLED)] * 3)
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("method", METHODS)
def test_order_and_batches_change_nothing(lm, method):
    requests = [(context, SAMPLED) for context in CONTEXTS[:4]]
    texts = answerer(lm, method=method).generate(requests)
    assert answerer(lm, method=method).generate(requests[::-1]) == texts[::-1]
    assert answerer(lm, method=method, batch_size=4).generate(requests) == texts
    assert answerer(lm, method=method).generate(requests[2:3]) == texts[2:3]
    assert answerer(lm, method=method, seed=1).generate(requests) != texts


@pytest.mark.exhaustive(every=4)
def test_a_run_that_is_killed_goes_on_to_the_same_file(lm, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    requests = [(context, SAMPLED) for context in CONTEXTS]
    pairs = [(context, " c") for context in CONTEXTS]

    def run(path, **changes):
        one = answerer(lm, record=path, **changes)
        return one.generate(requests), one.score(pairs), one.score_texts(CONTEXTS)

    found = run(whole)
    add, num = Record.adding, []

    def dies(record):
        with add(record) as real:
            yield lambda *answer: num.append(real(*answer)) if len(num) < 3 else sys.exit("killed")

    monkeypatch.setattr(Record, "adding", contextlib.contextmanager(dies))
    with pytest.raises(SystemExit):
        run(part)
    monkeypatch.undo()
    lines = read(part)
    assert len(lines) == 3
    with part.open("a") as file:
        file.write('{"key": "cut sh')
    texts, *scores = resumed = run(part, batch_size=4)
    assert texts == found[0]
    for ours, theirs in zip(scores, found[1:], strict=True):  # other rows, other roundings
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    same = ("key", "request", "text", "tokens", "is_greedy")
    kept = [[{k: v for k, v in x.items() if k in same} for x in read(p)] for p in (whole, part)]
    assert kept[0] == kept[1] and len(kept[0]) == 15
    again = run(part)  # asks nobody
    assert again == resumed and len(read(part)) == 15
    # Of other settings nothing is taken, and nothing is lost.
    assert run(part, seed=1)[0] != found[0] and len(read(part)) == 30
    assert run(part) == resumed


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_that_are_none_are_refused(tmp_path):
    path = tmp_path / "answers.jsonl"
    for line in ("[]", "{}", "5", '{"key": 1', '"key"'):
        path.write_text('{"key": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"answers.jsonl, line 2 is no answer with a key"):
            Record(path)
    path.write_text('{"key": "a"}\n')
    with Record(path).adding(), pytest.raises(ValueError, match="written by another process"):  # noqa: SIM117
        with Record(path).adding():
            pass


def test_two_records_of_one_file_keep_what_the_other_has_added(tmp_path):
    """Both were there before anything was; the one that brings order into it, too."""
    one, other = (Record(tmp_path / "record.jsonl") for _ in range(2))
    with one.adding() as add:
        add("a1", {"text": "x"})
    with other.adding() as add:
        assert "a1" in other.found
        add("b2", {"text": "y"})
        add("b1", {"text": "z"})
    with one.adding() as add:
        add("a2", {"text": "w"})
    other.put_in_order(["b1", "b2"])
    assert list(Record(tmp_path / "record.jsonl").found) == ["a1", "a2", "b1", "b2"]


def test_a_line_that_was_cut_short_is_taken_away(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b')
    record = Record(path)
    with record.adding() as add:
        add("c", {"text": "x\u2028"})
    assert record.found == Record(path).found == {"a": {}, "c": {"text": "x\u2028"}}


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("method", METHODS)
def test_texts_end_before_the_first_stop_string(lm, method):
    one = answerer(lm, method=method, gen_len=24)

    def text(until):
        return one.generate([("hello there", {"until": until})])[0]

    full = text([])
    assert len(full) > 8
    assert text(full[:2]) == text([full[:1]]) == ""
    early, late = full[3:5], full[6:8]
    place = min(full.find(early), full.find(late))
    assert text([late, early]) == text([early, late]) == full[:place]
    assert text(["", "zzzz"]) == full  # an empty one stops nothing


@pytest.mark.exhaustive(every=4)
def test_special_tokens_stop_texts_and_are_not_in_them(lm):
    eos = lm.tokenizer.decode([lm.cfg.eos_token_id], skip_special_tokens=False)
    bias = {"logit_bias": {lm.cfg.eos_token_id: 1e3}}
    endless = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, eos_token_id=0))
    (text,) = answerer(endless, options=bias).generate([("a", {"until": [eos[:6]]})])
    assert text == ""
    (text,) = answerer(lm, options=bias).generate([("a", {"until": []})])
    assert text == ""  # it ended as it began


def test_half_a_character_is_a_sign_and_no_error():
    (text,) = answerer(byte_lm(), gen_len=3).generate([("\N{SNOWMAN}", {"until": ["\n"]})])
    assert isinstance(text, str)


def test_lengths_come_from_requests_unless_they_are_set(lm):
    requests = [("a b", {"max_gen_toks": 5}), ("a c", {"max_new_tokens": 9}), ("a d", {})]
    free = answerer(lm, gen_len=0)
    with pytest.raises(ValueError, match="an answer of 256 tokens leaves no room for a prompt"):
        free.generate(requests)
    free.generate(requests[:2])
    assert free.about()["tokens"] <= 14
    tokens = [len(a["tokens"]) for a in free._record.found.values()]
    assert tokens == [5, 9]  # no end comes so early
    fixed = answerer(lm)
    fixed.generate(requests)
    assert {len(a["tokens"]) for a in fixed._record.found.values()} == {12}


def test_long_prompts_lose_their_beginning(lm, caplog):
    long = "abcdefgh ijkl mnop " * 5
    one = answerer(lm)
    with caplog.at_level("WARNING", logger="absl"):
        texts = one.generate([(long, {}), ("x" + long, {}), ("a", {})])
    assert texts[0] == texts[1] == complete(lm, long[-52:], gen_len=12).text
    assert one.about()["prompts_cut"] == 2
    assert sum("lose their beginning" in r.getMessage() for r in caplog.records) == 1
    (pair,) = one.score([(long, "abc")])
    (exact,) = causal_log_likelihood(lm, [(long[-62:].rstrip(), " abc")], batch_size=2)
    assert pair == (exact.log_prob, exact.is_greedy) and one.num_cut == 3


def test_without_context_a_begin_token_is_put_in_front_and_reported(lm, caplog):
    one, eos = answerer(lm), lm.cfg.eos_token_id
    with caplog.at_level("WARNING", logger="absl"):
        assert one.generate([("", {})]) == [complete(lm, [eos], gen_len=12).text]
        found = one.score([("", "ab"), (" ", "ab")])
    exact = causal_log_likelihood(lm, [([eos], ids(lm, x)) for x in ("ab", " ab")], batch_size=2)
    assert found == [(x.log_prob, x.is_greedy) for x in exact]
    assert one.about()["begin_tokens_added"] == 3
    (record,) = caplog.records
    assert f"go on from token {eos}" in record.getMessage()
    # A shifted diffusion model needs one, too, and one that is not shifted does not.
    shifted = answerer(lm, method="threshold")
    shifted.score([("", "a")])
    shifted.generate([("", {})])
    assert shifted.num_begun == 2
    plain = answerer(unshifted(lm), method="threshold")
    plain.score([("", "a")])
    plain.generate([("", {})])
    assert plain.num_begun == 0


def ids(lm, text):
    return lm.tokenizer.encode(text)


def unshifted(lm):
    return dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, shifted_logits=False))


@pytest.mark.parametrize(
    ("settings", "gen_len", "options", "length"),
    [
        ({}, 0, {"stop": []}, 256),
        ({"until": "x"}, 0, {"stop": ["x"]}, 256),
        ({"until": ["x", "", "y"], "max_gen_toks": 7}, 0, {"stop": ["x", "y"]}, 7),
        ({"max_tokens": 3, "max_new_tokens": 4}, 0, {"stop": []}, 4),
        ({"max_gen_toks": 7}, 5, {"stop": []}, 5),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, 0, {"stop": []}, 256),
        ({"temperature": 0.7}, 0, {"stop": [], "temperature": 0.7}, 256),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "typical_p": 0.5, "num_beams": 1},
            0,
            {"stop": [], "temperature": 0.7, "top_p": 0.9, "typical_p": 0.5},
            256,
        ),
    ],
)
def test_settings_in_words_of_the_loops(settings, gen_len, options, length):
    assert read_settings(settings, gen_len) == (options, length)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams=2 must be 1"),
        ({"do_sample": True}, "do_sample=True needs a temperature above 0, not 0"),
        ({"diversity_penalty": 1.0}, "generation_kwargs has diversity_penalty=1.0, which is not"),
        ({"max_gen_toks": 1.5}, "max_gen_toks=1.5 must be a whole number"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        read_settings(settings, 0)


# ---- Likelihoods


PAIRS = [("hello", " you"), ("hello", " a"), ("what?", "b"), ("one two", " three"), ("hello", " a")]


def test_an_autoregressive_model_judges_exactly(lm):
    exact = causal_log_likelihood(lm, PAIRS, batch_size=2)
    expected = [(one.log_prob, one.is_greedy) for one in exact]
    assert answerer(lm).score(PAIRS) == expected
    again = answerer(lm, batch_size=4).score(PAIRS[::-1])
    assert [x for x, _ in again] == pytest.approx([x for x, _ in expected[::-1]])


def test_a_diffusion_model_judges_by_a_bound(lm):
    one = answerer(lm, method="threshold", batch_size=4)
    found = one.score(PAIRS)
    assert found[1] != found[4]  # drawn twice
    again = answerer(lm, method="threshold", batch_size=4).score(PAIRS[::-1])
    assert again[1:3] == found[2:4][::-1] and {*again} == {*found}
    assert answerer(lm, method="threshold", batch_size=4).score(PAIRS[3:4]) == found[3:4]
    seed = int(one._hashes("loglikelihood", PAIRS)[0][:8], 16)
    (same,) = log_likelihood(lm, PAIRS[:1], num_samples=4, batch_size=4, seed=[seed])
    assert found[0] == (same.log_prob, False)
    greedy = answerer(lm, method="threshold", batch_size=4, checks_greedy=True).score(PAIRS[:2])
    assert [flag for _, flag in greedy] == greedy_match(lm, PAIRS[:2], batch_size=4)
    # One token is exact, whatever the number of copies.
    many = answerer(lm, method="threshold", batch_size=4, num_samples=8)
    assert many.score(PAIRS[2:3]) == found[2:3] and many.score(PAIRS[:1]) != found[:1]
    judged = [a for a in one._record.found.values() if a["num_tokens"] == 1]
    assert [a["num_forwards"] for a in judged] == [1]


def test_continuations_that_say_nothing_are_refused(lm):
    with pytest.raises(ValueError, match="the answer of pair 1 has 0 tokens"):
        answerer(lm).score([PAIRS[0], ("hello", "")])


@pytest.mark.parametrize("num", [0, 1, 3, 4, 5, 8, 9, 15])
def test_windows_predict_every_token_once(num):
    tokens, size = list(range(100, 100 + num)), 4
    windows = list(rolling_windows(tokens, 7, size))
    assert [token for _, predicted in windows for token in predicted] == tokens
    whole = [7, *tokens]
    for n, (before, predicted) in enumerate(windows):
        end = 1 + min((n + 1) * size, num)
        start = end - len(predicted)
        assert len(before) >= 1 and len(before) + len(predicted) <= size + 1
        assert before == whole[start - len(before) : start] and (n == 0 or before[0] != 7)
    if num == 9:  # the last one has as much before it as fits
        assert windows[-1] == ([104, 105, 106, 107], [108])


def test_whole_texts_have_one_begin_token(lm):
    """Whatever the tokenizer puts around texts; none is judged."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    begin = tokenizer.eos_token_id, tokenizer.backend.id_to_token(tokenizer.eos_token_id)
    tokenizer.backend.post_processor = frame(begin[::-1], None)
    tokenizer = dataclasses.replace(tokenizer, bos_token_id=begin[0])
    (found,) = answerer(dataclasses.replace(lm, tokenizer=tokenizer)).score_texts(["hello"])
    pair = [begin[0]], lm.tokenizer.encode("hello")
    assert found == pytest.approx(causal_log_likelihood(lm, [pair])[0].log_prob)


@pytest.mark.parametrize("guidance", [None, 0.0, 1.5])
def test_guidance_is_the_methods_own_unless_it_is_said(lm, guidance, monkeypatch):
    said = []
    monkeypatch.setattr(
        "decode.generate.as_finished",
        lambda lm, prompts, **options: said.append(options) or iter(()),
    )
    with contextlib.suppress(KeyError):  # nothing is answered
        answerer(lm, method="threshold", guidance=guidance).generate([("a", {"until": []})])
    assert said[0]["guidance"] == guidance


@pytest.mark.exhaustive(every=4)
def test_long_texts_are_judged_in_windows(lm):
    text = "the quick brown fox jumps over the lazy dog " * 3
    tokens = ids(lm, text)
    windows = list(rolling_windows(tokens, lm.cfg.eos_token_id, 64))
    expected = [one.log_prob for one in causal_log_likelihood(lm, windows, batch_size=2)]
    assert answerer(lm).score_texts([text, "a"])[0] == pytest.approx(math.fsum(expected))
    assert answerer(lm).score_texts([""]) == [0.0]
    one = answerer(lm, method="threshold")  # 63 tokens behind a begin token, and the rest
    assert one.score_texts([text]) == answerer(lm, method="threshold").score_texts([text])
    (answer,) = one._record.found.values()
    assert answer["num_tokens"] == len(tokens) > 2 * 63
    plain = answerer(unshifted(lm), method="threshold")
    assert [len(b) for b, _ in plain._windows(text)] == [0, 0, 0]


# ---- Chats


def test_conversations_are_rendered(lm):
    history = [{"role": "user", "content": "hello"}]
    whole = render_chat(lm.tokenizer, history)
    assert whole == "<user>hello<assistant>" and isinstance(whole, Rendered)


def test_the_beginning_of_an_answer_is_gone_on_with(lm):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    trimming = dataclasses.replace(lm.tokenizer, chat_template=template)
    keeping = dataclasses.replace(lm.tokenizer, chat_template=template.replace(" | trim", ""))
    for said in ("so it is", "so it is ", "hello"):
        history = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
        begun = [render_chat(one, history, False) for one in (trimming, keeping)]
        assert begun == [f"<user>hello<end><assistant>{x}" for x in (said.strip(), said)]
        assert all(isinstance(text, Rendered) for text in begun)
    silent = dataclasses.replace(lm.tokenizer, chat_template="<user>")
    with pytest.raises(ValueError, match="the chat template does not write the last message"):
        render_chat(silent, history, False)


def test_nonsense_is_refused(lm):
    with pytest.raises(ValueError, match="tasks are text, and the checkpoint has no tokenizer"):
        Answerer(lm=dataclasses.replace(lm, tokenizer=None))
    with pytest.raises(ValueError, match="gen_len=-1 must be at least 0"):
        answerer(lm, gen_len=-1)
    for method, option, loop in (
        (None, {"cache": "dual"}, "complete"),
        ("threshold", {"drafter": 3}, "generate"),
        *((None, {name: 1}, "complete") for name in ("seed", "temperature", "num_return", "stop")),
        ("threshold", {"guidance": 2.0}, "generate"),
    ):
        message = f"options has {next(iter(option))}=.*, which is no choice of decode.{loop}, or"
        with pytest.raises(ValueError, match=message):
            answerer(lm, method=method, options=option)
    for name, value in (("guidance", 0.5), ("antithetic", True), ("checks_greedy", True)):
        with pytest.raises(ValueError, match=f"{name}={value} must be left out: only diffusion"):
            answerer(lm, **{name: value})
    with pytest.raises(ValueError, match="there is no method 'prompt_lokup'; close: prompt_lookup"):
        answerer(lm, method="prompt_lokup").generate([("a", {})])
