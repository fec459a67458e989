"""What strategies write: published traces, oracles in plain Python, and prompts in any company."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from decode.complete import complete
from decode.core.requests import lay_out
from decode.core.sampling import Sampling
from decode.search import loop
from decode.search.components import METHODS, Beam, Contrastive, DiverseBeam, Momentum
from decode.search.contracts import NEVER, Round, Texts, staying
from decode.search.loop import SearchMethod
from decode.search.strategies.momentum import repeats
from decode.speculative.loop import SpeculativeMethod
from dlm import vocab
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.window import Window
from tests.lib.docs import check_refusals
from tests.lib.jitted import as_one_program
from tests.lib.paths import GOLDEN
from tests.lib.search import found, point, search
from tests.lib.speculation import random_prompts, run, texts
from tests.lib.tiers import more

GREEDY = Beam(num_beams=1, length_penalty=0.0)
PUBLISHED = {
    "beam_search": SearchMethod(Beam(), num_return=4),
    "diverse_beam_search": SearchMethod(DiverseBeam(), num_return=6),
    "contrastive_search": SearchMethod(Contrastive()),
    "greedy_no_repeat_ngram": SearchMethod(GREEDY, no_repeat_ngram=2),
}


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    """A model whose texts end now and then, and eight prompts."""
    prompts = random_prompts(toy_cfg, 8)
    rows = texts(run(toy_params, toy_cfg, SpeculativeMethod(), prompts), 8)
    used = np.bincount(np.concatenate(rows), minlength=toy_cfg.vocab_size)
    eos = int(np.argsort(used)[-3])
    return dataclasses.replace(toy_cfg, eos_token_id=eos, mask_token_id=None), toy_params, prompts


# ---- Published ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_target", *more("llama_draft", "qwen2_small")])
@pytest.mark.parametrize("case", PUBLISHED)
def test_texts_and_scores_are_those_of_hugging_face(name, case):
    lm = dlm.load(GOLDEN / name, tokenizer=None)
    traces = json.loads((GOLDEN / name / "traces.json").read_text())
    (theirs,) = (x["results"] for x in traces["cases"] if x["method"] == case)
    method = PUBLISHED[case].replace(stop_ids=(traces["eos_token_id"],))
    every = (lm.cfg, lm.params, traces["prompts"])
    _, ours = search(every, method, gen_len=traces["max_new_tokens"])
    for b, (prompt, their) in enumerate(zip(traces["prompts"], theirs, strict=True)):
        for r, sequence in enumerate(their["sequences"]):
            completion = found(ours, b, r)
            assert sequence[len(prompt) :][: len(completion)] == completion
            assert set(sequence[len(prompt) + len(completion) :]) <= {52}  # padding
        if "scores" in their:
            np.testing.assert_allclose(ours.score[b], their["scores"], rtol=0, atol=1e-4)


# ---- By hand ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def law(toy):
    """log p(. | tokens) as float64 [V], of the model itself."""
    cfg, params, _ = toy

    @jax.jit
    def read(tokens, length):
        out = decoder.forward(
            params, cfg, Window.at(tokens, jnp.zeros(1, jnp.int32), is_causal=True)
        )
        hidden = out.hidden[:, length - 1]
        return jax.nn.log_softmax(vocab.logits(vocab.head(params), hidden))[0], out.hidden[0]

    @functools.cache
    def of(tokens):
        padded = jnp.array([*tokens, *[0] * (32 - len(tokens))])[None]
        log_probs, hidden = read(padded, len(tokens))
        return np.asarray(log_probs, np.float64), np.asarray(hidden, np.float64)[: len(tokens)]

    return of


def beam_by_hand(law, prompt, strategy, gen_len, eos):
    """As the card says: (score, tokens), the best first."""
    K, norm = strategy.num_beams, lambda n: float(strategy.norm(jnp.int32(n)))
    alive, aside = [(0.0, ())], []
    for n in range(1, gen_len + 1):
        every = [
            (score + gain, (*text, token))
            for score, text in alive
            for token, gain in enumerate(law((*prompt, *text))[0])
        ]
        every = sorted(every, key=lambda x: -x[0])[: 2 * K]
        aside += [(s / norm(n), text) for s, text in every[:K] if text[-1] == eos]
        aside = sorted(aside, key=lambda x: -x[0])[:K]
        alive = [(s, text) for s, text in every if text[-1] != eos][:K]
        length = gen_len if strategy.ends == "safe" and strategy.length_penalty > 0 else n
        best = every[0][0] / norm(length)
        if len(aside) == K and (strategy.ends == "first" or aside[-1][0] >= best):
            return aside
    aside += [(s / norm(gen_len), text) for s, text in alive]
    return sorted(aside, key=lambda x: -x[0])[:K]


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "strategy",
    [
        Beam(num_beams=3),
        *more(
            Beam(num_beams=1, length_penalty=0.0),
            Beam(num_beams=2, ends="first"),
            Beam(num_beams=4, length_penalty=0.6, length_offset=5.0, ends="safe"),
            Beam(num_beams=3, length_penalty=-1.0, ends="safe"),
        ),
    ],
)
def test_beams_by_hand(toy, law, strategy):
    method = SearchMethod(strategy, num_return=strategy.num_beams)
    state, ours = search(toy, method)
    for b, prompt in enumerate(toy[2]):
        expected = beam_by_hand(law, tuple(prompt), strategy, 10, toy[0].eos_token_id)
        assert [found(ours, b, r) for r in range(strategy.num_beams)] == [
            list(text) for _, text in expected
        ]
        np.testing.assert_allclose(ours.score[b], [s for s, _ in expected], atol=1e-4)
    assert np.asarray(state.num_moves).sum() > 0 or strategy.num_beams == 1


@pytest.mark.parametrize(("log_prob", "ends"), [(-0.5, True), (-3.0, False)])
def test_a_text_ends_only_among_the_first_k_continuations(log_prob, ends):
    """Totals are -0.1, -1.1, -1.6 and that of 9, which ends a text if it is the second best."""
    beam = Beam(num_beams=2, length_penalty=0.0)

    @jax.jit
    def advance(tokens, log_probs):
        one = jnp.array([3])
        seen = Round(
            best=None, log_probs=None, probs=None, stats=None, hidden=None,
            candidates=tokens[:, :, :1],
            tokens=jnp.zeros((1, 2, 8), jnp.int32), log_prob=jnp.zeros((1, 2, 4)), length=one + 1,
            prompt_len=one, end=one + 4, is_first=one < 0, is_end=lambda x: x == 9, embed=None,
            score=jnp.array([[0.0, -1.0]]), key=None, active=one > 0,
        )  # fmt: skip
        total = seen.score[:, :, None] + log_probs
        return beam.advance(seen, beam.init(None, 1, 8, 4), tokens, log_probs, total)

    log_probs = np.float32([[[-0.1, log_prob], [-0.1, -0.6]]])
    choice = advance(np.int32([[[5, 9], [6, 7]]]), log_probs)
    assert (float(choice.state.score[0, 0]) > NEVER / 2) is ends
    assert choice.token.tolist() == [[5, 6]] and choice.source.tolist() == [[0, 1]]


@pytest.mark.exhaustive(every=4)
def test_enough_beams_find_the_most_probable_text(toy, law):
    """Of all texts of two tokens, as many beams as there are tokens know the best."""
    cfg, _, prompts = toy
    V = cfg.vocab_size
    method = SearchMethod(Beam(num_beams=V, length_penalty=0.0, ends="safe"))
    _, ours = search(toy, method, prompts[:2], gen_len=2)
    for b, prompt in enumerate(prompts[:2]):
        first = law(tuple(prompt))[0]
        every = [((t,), first[t]) for t in range(V) if t == cfg.eos_token_id]
        for t, u in itertools.product(range(V), repeat=2):
            if t != cfg.eos_token_id:
                every.append(((t, u), first[t] + law((*prompt, t))[0][u]))
        text, score = max(every, key=lambda x: x[1])
        assert found(ours, b) == list(text)
        assert float(ours.score[b, 0]) == pytest.approx(score, abs=1e-4)


def test_scores_are_those_of_the_texts_read_again(toy, law):
    """Which keys and values moved wrongly would not be."""
    method = SearchMethod(Beam(num_beams=4, length_penalty=0.0), num_return=4)
    _, ours = search(toy, method, gen_len=14)
    for b, prompt in enumerate(toy[2]):
        for r in range(4):
            tokens = found(ours, b, r)
            each = [law((*prompt, *tokens[:i]))[0][t] for i, t in enumerate(tokens)]
            np.testing.assert_allclose(ours.log_prob[b, r, : len(tokens)], each, atol=1e-4)
            assert float(ours.score[b, r]) == pytest.approx(sum(each), abs=1e-3)


@pytest.mark.exhaustive(every=4)
def test_groups_avoid_each_others_words(toy):
    """A group for each beam and a penalty without end: no two choose the same word in a round."""
    group = Beam(num_beams=1, min_len=10)  # nobody ends before
    free, bound = (
        SearchMethod(DiverseBeam(group, num_groups=4, diversity=x), num_return=4)
        for x in (0.0, 1e4)
    )
    _, alone = search(toy, SearchMethod(group))
    state, same = search(toy, free)
    _, other = search(toy, bound)
    for b in range(len(toy[2])):
        assert {tuple(found(same, b, r)) for r in range(4)} == {tuple(found(alone, b))}
        assert found(alone, b) in [found(other, b, r) for r in range(4)]  # the first is free
        assert len({found(other, b, r)[0] for r in range(4)}) == 4
    assert not np.asarray(state.num_moves).any()


def contrastive_by_hand(law, prompt, k, alpha, gen_len, eos):
    text = list(prompt)
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    while len(text) < len(prompt) + gen_len and (len(text) == len(prompt) or text[-1] != eos):
        log_probs, hidden = law(tuple(text))
        best, value = None, -np.inf
        for v in np.argsort(-log_probs, kind="stable")[:k]:
            likeness = (unit(law((*text, int(v)))[1][-1]) @ unit(hidden).T).max()
            score = (1 - alpha) * np.exp(log_probs[v]) - alpha * likeness
            if score > value + 1e-9:
                best, value = int(v), score
        text.append(best)
    return text[len(prompt) :]


@pytest.mark.parametrize("alpha", [0.6, *more(0.0, 0.9)])
def test_contrastive_by_hand(toy, law, alpha):
    _, ours = search(toy, SearchMethod(Contrastive(k=3, alpha=alpha)), gen_len=6)
    for b, prompt in enumerate(toy[2]):
        expected = contrastive_by_hand(law, prompt, 3, alpha, 6, toy[0].eos_token_id)
        assert found(ours, b) == expected


def momentum_by_hand(law, prompt, strategy, gen_len, eos):
    text = list(prompt)
    table = [0.0, *strategy.resistance]
    while len(text) < len(prompt) + gen_len and (len(text) == len(prompt) or text[-1] != eos):
        log_probs, _ = law(tuple(text))
        pool = np.argsort(-log_probs, kind="stable")[: strategy.k]
        m = [0] * len(pool)
        for i, v in enumerate(pool):
            for n in range(1, len(table) + 1):
                gram = [*text[len(text) - n + 1 :], int(v)]
                if any(text[j : j + n] == gram for j in range(len(text) - n + 1)):
                    m[i] = n
        f = [table[x] if x < len(table) else np.inf for x in m]
        score = [np.exp(log_probs[v]) - strategy.alpha * y for v, y in zip(pool, f, strict=True)]
        text.append(int(pool[np.argmax(score)] if max(score) > -np.inf else pool[np.argmin(m)]))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    "strategy", [Momentum(k=3), *more(Momentum(k=2, resistance=(0.0, np.inf)))]
)
def test_momentum_by_hand(toy, law, strategy):
    _, ours = search(toy, SearchMethod(strategy), gen_len=12)
    for b, prompt in enumerate(toy[2]):
        expected = momentum_by_hand(law, prompt, strategy, 12, toy[0].eos_token_id)
        assert found(ours, b) == expected


def test_repeats_by_hand():
    text, length = jnp.array([[1, 2, 1, 2, 9, 9]]), jnp.array([4])
    m = repeats(text, length, jnp.array([[1, 2, 3, 9]]), 6)
    assert m.tolist() == [[3, 1, 0, 0]]  # "1 2 1" came up, of 2 alone, of 9 nothing


# ---- One hypothesis is plain decoding, and what shapes it ---------------------------------------


@pytest.mark.exhaustive(every=4)
def test_one_hypothesis_writes_the_greedy_text(toy):
    cfg, params, prompts = toy
    greedy = texts(run(params, cfg, SpeculativeMethod(), prompts, gen_len=10), 8)
    for strategy in (
        *(GREEDY, Beam(num_beams=1), Contrastive(k=1)),
        *(Contrastive(k=3, alpha=0.0), Momentum(k=1), Momentum(alpha=0.0)),
    ):
        _, ours = search(toy, SearchMethod(strategy))
        assert [found(ours, b) for b in range(8)] == greedy, strategy


@pytest.mark.exhaustive(every=4)
def test_bans_and_penalties(toy):
    """No pair of tokens comes up twice; a penalty of all that came up makes texts different."""
    cfg, params, prompts = toy
    method = SearchMethod(Beam(num_beams=3), no_repeat_ngram=2, num_return=3)
    _, ours = search(toy, method, gen_len=14)
    for b, prompt in enumerate(prompts):
        for r in range(3):
            text = [*prompt[-1:], *found(ours, b, r)]
            pairs = list(itertools.pairwise(text))
            assert len(set(pairs)) == len(pairs)
    lm = LanguageModel(params, cfg)
    options = dict(gen_len=10, method="beam_4")
    plain, penalised, biased = (
        complete(lm, prompts, **options, **more_options)
        for more_options in ({}, {"repetition_penalty": 9.0}, {"logit_bias": {3: 1e4}})
    )
    assert [a.tokens.tolist() for a in plain] != [a.tokens.tolist() for a in penalised]
    assert all(set(a.tokens.tolist()) <= {3} for a in biased)
    assert all(a.score is not None and a.score <= 0 for a in plain)


# ---- Rows ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", ["beam_4", *more(*(n for n in METHODS if n != "beam_4"))])
def test_a_prompt_alone_finds_what_it_finds_in_a_batch(toy, name):
    method = point(name, toy[0])
    method = method.replace(num_return=method.strategy.num_results)
    options = dict(prompt_len=13, canvas_len=10)
    _, together = search(toy, method, **options)
    for b in (0, 5):
        _, alone = search(toy, method, [toy[2][b]], seeds=[b], **options)
        for r in range(method.num_return):
            assert found(alone, 0, r) == found(together, b, r)
        np.testing.assert_allclose(alone.score[0], together.score[b], atol=1e-5)


def test_rows_that_are_replaced_find_the_same(toy):
    cfg, params, prompts = toy
    lm = LanguageModel(params, cfg)
    options = dict(gen_len=[3, 9, 5, 10, 2, 7, 10, 4], method="beam_4", num_return=3)
    whole, refilled = (complete(lm, prompts, **options, batch_size=n) for n in (8, 3))
    for a, b in zip(whole, refilled, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert [x.tokens.tolist() for x in a.others] == [x.tokens.tolist() for x in b.others]
        assert len(a.others) == 2 and a.score >= a.others[0].score >= a.others[1].score


def test_hypotheses_stay_where_they_are_if_they_can():
    source = jnp.array([[0, 1, 2, 3], [1, 1, 3, 1], [2, 2, 2, 2]])
    order = np.asarray(jax.jit(staying)(source))
    placed = np.take_along_axis(np.asarray(source), order, axis=1)
    assert placed.tolist() == [[0, 1, 2, 3], [1, 1, 1, 3], [2, 2, 2, 2]]
    assert np.sort(order, axis=1).tolist() == [[0, 1, 2, 3]] * 3
    assert order[1].tolist() == [1, 0, 3, 2]


@pytest.mark.exhaustive(every=4)
def test_finished_prompts_make_no_forwards(toy):
    state, ours = search(toy, SearchMethod(Beam(num_beams=2, ends="first")), gen_len=20)
    forwards = np.asarray(state.num_forwards)
    assert forwards.min() < forwards.max() <= 20
    assert (ours.score > NEVER / 2).all()


def test_prompts_are_read_once(toy, monkeypatch):
    """Not once per hypothesis: the window that reads them has a row per prompt."""
    cfg, params, prompts = toy
    rows = []
    forward = decoder.forward
    monkeypatch.setattr(
        loop.decoder, "forward", lambda *a, **k: rows.append(a[2].tokens.shape) or forward(*a, **k)
    )
    jax.eval_shape(
        lambda: loop._begin.__wrapped__(
            params, cfg, SearchMethod(Beam(num_beams=5)),
            *lay_out(cfg, prompts, [4] * 8, 8, 32), np.zeros((8, 2), np.uint32), 4, 8,
        )
    )  # fmt: skip
    assert set(rows) == {(8, 8)}


# ---- What makes no sense ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Beam, DiverseBeam, Contrastive, Momentum])
def test_nonsense_is_refused(toy, kind):
    check_refusals(kind(), lambda made: SearchMethod(made).validate(toy[0]), toy[0])


@pytest.mark.parametrize(
    "made, message",
    [
        (Momentum(alpha=np.inf), "alpha=inf must be finite"),
        (Momentum(resistance=[1.0]), r"resistance=\[1.0\] must be a tuple"),
        (DiverseBeam(diversity=np.inf), "diversity=inf must be finite"),
        (DiverseBeam(Beam(num_beams=2.5)), "num_beams=2.5 must be a whole number"),
        (Beam(length_offset=np.inf), "length_offset=inf must be finite"),
    ],
)
def test_numbers_that_make_no_scores_are_refused(toy, made, message):
    with pytest.raises(ValueError, match=message):
        SearchMethod(made).validate(toy[0])


@pytest.mark.parametrize("strategy", [Beam(num_beams=2), DiverseBeam(Beam(num_beams=1), 2)])
def test_what_could_not_go_on_is_shown_as_far_as_it_came(toy, strategy):
    texts = Texts(
        np.array([[[5, 6, 0], [7, 8, 0]]]), np.zeros((1, 2, 3)), np.array([2]),
        np.full((1, 2), NEVER, np.float32),
    )  # fmt: skip
    found = as_one_program(lambda x: strategy.finish(x, strategy.init(toy[0], 1, 4, 3)))(texts)
    assert found.tokens[0, 0, : int(found.num_tokens[0, 0])].tolist() == [5, 6]
    assert (np.asarray(found.score) == NEVER).all()


def test_what_a_search_does_not_do_is_said(toy):
    lm = LanguageModel(toy[1], toy[0])
    for options, message in (
        ({"temperature": 0.5}, "Beam draws nothing, so temperature goes without it"),
        ({"top_k": 5}, "Beam draws nothing, so top_k goes without it"),
        ({"num_return": 5}, r"num_return=5 must be in \[1, 4\]"),
        ({"top_logprobs": 2}, "top_logprobs=2 is for one text at a time"),
        ({"stop": "x"}, "stop="),
    ):
        with pytest.raises(ValueError, match=message):
            complete(lm, [1, 2, 3], method="beam_4", gen_len=4, **options)
    with pytest.raises(ValueError, match="no_repeat_ngram=-1 must be at least 0"):
        SearchMethod(GREEDY, no_repeat_ngram=-1).validate(toy[0])
    for options in ({"no_repeat_ngram": 2}, {"sampling": Sampling(None, repetition_penalty=1.2)}):
        with pytest.raises(ValueError, match="goes without Contrastive"):
            SearchMethod(Contrastive(), **options).validate(toy[0])
    with pytest.raises(ValueError, match="must be of class Strategy"):
        SearchMethod(Sampling()).validate(toy[0])
