"""Cautious next token prediction: an oracle with its random streams, laws, and what is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.complete import complete
from decode.core.sampling import Sampling, draw
from decode.core.streams import fold_in
from decode.search import judge
from decode.search.components import CNTP, METHODS
from decode.search.contracts import NEVER, Round
from decode.search.loop import SearchMethod, begin, decode, step
from decode.search.strategies.cntp import MARKS, punctuation_mask
from decode.search.strategies.trials import Trials
from decode.speculative.loop import SpeculativeMethod
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from tests.lib.docs import check_refusals
from tests.lib.jitted import as_one_program
from tests.lib.models import laws_of, markov
from tests.lib.search import found, search
from tests.lib.speculation import assert_same_law, random_prompts, run, texts
from tests.lib.tiers import more
from tests.lib.untrained import byte_lm

SAMPLING = CNTP.sampling
STOPS = np.isin(np.arange(24), [3, 7, 11, 16])
CAUTIOUS = CNTP(3, max_entropy=1.0, max_len=4, punctuation=STOPS)


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    """A model, and prompts."""
    cfg = dataclasses.replace(toy_cfg, eos_token_id=19, mask_token_id=None)
    return cfg, toy_params, random_prompts(cfg, 8)


@jax.jit
def drawn(seed, forwards, trial, log_p):
    key = jnp.stack([jnp.uint32(0), seed])[None]
    return draw(fold_in(fold_in(key, forwards), trial), jnp.exp(log_p)[None])[0]


def law_by_hand(toy, tokens, temperature=0.8, top_p=0.95):
    cfg, params, _ = toy
    p = laws_of(params, cfg, tokens, temperature)[-1]
    order = np.argsort(-p, kind="stable")
    out = order[np.cumsum(p[order]) - p[order] >= top_p]
    p[out] = 0
    return p / p.sum()


def by_hand(toy, strategy, prompt, seed, gen_len):
    """As the card says: the text, its log-probability, forwards, tokens that were drawn."""
    eos, text, total, forwards, num_drawn = toy[0].eos_token_id, [], 0.0, 0, 0
    while len(text) < gen_len and text[-1:] != [eos]:
        p = law_by_hand(toy, [*prompt, *text])
        some = p[p > 0]
        share = (-(some * np.log(some)).sum() - strategy.min_entropy) / (
            strategy.max_entropy - strategy.min_entropy
        )
        N = int(1 + (strategy.max_trials - 1) * np.clip(share, 0, 1))
        if strategy.formula == "paper":
            N = int(np.clip(strategy.max_trials * share, 1, strategy.max_trials))
        trials = []
        for k in range(N):
            trial, score = [], 0.0
            while True:
                p = law_by_hand(toy, [*prompt, *text, *trial])
                with np.errstate(divide="ignore"):
                    token = int(drawn(seed, forwards + len(trial), k, np.float32(np.log(p))))
                trial.append(token)
                score += np.log(p[token])
                is_last = len(text) + len(trial) == gen_len or len(trial) == strategy.max_len
                if N == 1 or is_last or token == eos or strategy.punctuation[token]:
                    break
            trials.append((score / len(trial), score, trial))
        _, score, best = max(trials, key=lambda x: x[0])
        text, total = text + best, total + score
        forwards += max(len(trial) for *_, trial in trials)
        num_drawn += sum(len(trial) for *_, trial in trials)
    return text, total, forwards, num_drawn


@pytest.mark.parametrize(
    "strategy",
    [
        CAUTIOUS,
        *more(
            CAUTIOUS.replace(max_trials=4, formula="paper", max_entropy=0.5),
            CAUTIOUS.replace(min_entropy=-1.0, max_entropy=-0.5),
            CAUTIOUS.replace(max_len=1),
        ),
    ],
)
def test_texts_by_hand(toy, strategy):
    """Of prompts together, and of one alone; other numbers compile nothing."""
    method, options = SearchMethod(strategy, SAMPLING), dict(prompt_len=13, canvas_len=10)
    state, ours = search(toy, method, seeds=range(8), **options)
    num_drawn = np.asarray(strategy.counts(state.strategy)["num_drawn"])
    for b, prompt in enumerate(toy[2]):
        text, score, forwards, drawn_by_hand = by_hand(toy, strategy, prompt, b, 10)
        assert found(ours, b) == text
        assert float(ours.score[b, 0]) == pytest.approx(score, abs=1e-3)
        assert (int(state.num_forwards[b]), int(num_drawn[b])) == (forwards, drawn_by_hand)
    assert num_drawn.sum() > ours.num_tokens.sum()
    assert np.asarray(state.num_moves).any() or strategy.max_len == 1
    num_programs = decode._cache_size()
    for b, prompt in enumerate(toy[2]):
        _, alone = search(toy, method, [prompt] * 8, seeds=[b] * 8, **options)
        assert {tuple(found(alone, i)) for i in range(8)} == {tuple(found(ours, b))}
        n = ours.num_tokens[b, 0]
        np.testing.assert_allclose(alone.log_prob[0, 0, :n], ours.log_prob[b, 0, :n], atol=1e-4)
    assert decode._cache_size() == num_programs


@pytest.mark.parametrize(
    "sure",
    [
        CAUTIOUS.replace(min_entropy=3.3, max_entropy=9.0),
        *more(CAUTIOUS.replace(max_trials=1)),
    ],
)
def test_one_trial_is_ordinary_sampling(toy, sure):
    """With one at most, or where no entropy is high enough (ln 24 < 3.3): drawn, a token a time."""
    method, options = SearchMethod(sure, SAMPLING), dict(prompt_len=13, canvas_len=10)
    state, ours = search(toy, method, seeds=range(8), **options)
    for b, prompt in enumerate(toy[2]):
        text = []
        for i in range(len(found(ours, b))):
            with np.errstate(divide="ignore"):
                log_p = np.float32(np.log(law_by_hand(toy, [*prompt, *text])))
            text.append(int(drawn(b, i, 0, log_p)))
        assert found(ours, b) == text and (len(text) == 10 or text[-1] == toy[0].eos_token_id)
    assert not np.asarray(state.num_moves).any()
    assert (np.asarray(state.strategy.num_drawn) == ours.num_tokens[:, 0]).all()


@pytest.mark.exhaustive
def test_one_trial_follows_the_law_of_ordinary_sampling(toy):
    cfg, params, prompts = toy
    prompts, seeds = [prompts[2]] * 3000, range(3000)
    _, ours = search(toy, SearchMethod(CNTP(1), SAMPLING), prompts, gen_len=2, seeds=seeds)
    method = SpeculativeMethod(sampling=SAMPLING)
    theirs = run(params, cfg, method, prompts, gen_len=2, seeds=range(7000, 10_000))
    assert_same_law([found(ours, b) for b in range(3000)], texts(theirs, 3000))


@pytest.mark.exhaustive
def test_the_branch_that_goes_on_surely_wins_if_any_trial_takes_it():
    """Behind 0 come 1 with probability q, and 2; behind 1 always 3, behind 2 any of 3 to 7."""
    q, N, num = 0.3, 3, 2000
    table = np.full((8, 8), 1 / 8)
    table[0] = [0, q, 1 - q, 0, 0, 0, 0, 0]
    table[1] = np.eye(8)[3]
    table[2] = [0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2]
    params, cfg = markov(table)
    strategy = CNTP(N, min_entropy=-0.2, max_entropy=-0.1, punctuation=np.arange(8) >= 3)
    method = SearchMethod(strategy, Sampling(1.0))
    _, ours = search((cfg, params, [[0]] * num), method, gen_len=2, seeds=range(num))
    share, expected = (ours.tokens[:, 0, 0] == 1).mean(), 1 - (1 - q) ** N
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / num)


def test_a_trial_behind_which_nothing_is_allowed_does_not_win():
    """Two trials at the last place: the surer one has nowhere to go."""
    at = lambda *values: jnp.array(values, jnp.int32)

    def choice(score):
        log_probs = jnp.full((1, 2, 1, 4), NEVER).at[0, 1].set(jnp.log(0.25))
        seen = Round(
            best=None, log_probs=lambda: log_probs, probs=lambda: jax.nn.softmax(log_probs),
            stats=None, hidden=None, candidates=None, tokens=jnp.zeros((1, 2, 4), jnp.int32),
            log_prob=jnp.zeros((1, 2, 2)), length=at(2), prompt_len=at(1), end=at(3),
            is_first=at(0) > 0, is_end=lambda tokens: tokens < 0, embed=None, score=score,
            key=jnp.zeros((1, 2), jnp.uint32), active=at(1) > 0,
        )  # fmt: skip
        trials = Trials(at(2), at(0), jnp.ones((1, 2), jnp.int32), score, jnp.zeros((1, 2), bool))
        state = CNTP(2).init(None, 1, 4, 2).replace(trials=trials)
        return CNTP(2, max_len=2).choose(seen, state)

    chosen = as_one_program(choice)(jnp.array([[-1.0, -2.0]]))
    assert int(chosen.source[0, 0]) == 1
    assert float(chosen.score[0, 0]) == pytest.approx(-2 + np.log(0.25))


def test_how_many_trials():
    entropy = np.linspace(-1, 5, 601, dtype=np.float32)
    for formula in ("code", "paper"):
        num = np.asarray(CNTP(10, 0.5, 2.5, formula=formula).num_trials(entropy))
        assert (np.diff(num) >= 0).all() and (num[0], num[-1]) == (1, 10)
        assert {*num} == {*range(1, 11)}
    at = np.float32([0.5, 1.45, 1.55, 2.5])
    assert CNTP(10, 0.5, 2.5).num_trials(at).tolist() == [1, 5, 5, 10]
    assert CNTP(10, 0.5, 2.5, formula="paper").num_trials(at).tolist() == [1, 4, 5, 10]


def test_rows_that_wait_are_not_read(toy, monkeypatch):
    """While all prompts are sure the first row of each is; with trials all of them."""
    cfg, params, prompts = toy
    rows = []
    forward = decoder.forward

    def counted(*args, **options):
        jax.debug.callback(lambda n: rows.append(int(n)), len(args[2].tokens))
        return forward(*args, **options)

    monkeypatch.setattr(judge.decoder, "forward", counted)
    turn = jax.jit(step, static_argnums=1)
    for entropy, read in ((8.0, {2}), (-2.0, {2, 6})):
        strategy = CAUTIOUS.replace(min_entropy=entropy, max_entropy=entropy + 0.1)
        method = SearchMethod(strategy, SAMPLING)
        state = begin(params, cfg, method, prompts[:2], gen_len=4, chunk=8)
        rows.clear()
        for _ in range(3):
            state = turn(params, cfg, method, state)
        jax.effects_barrier()
        assert {*rows} == read and len(rows) == 3


@pytest.mark.exhaustive(every=4)
def test_what_complete_takes_from_a_model():
    """Its tokenizer's punctuation and the method's temperature; samples; what was drawn."""
    lm = byte_lm()
    options = dict(gen_len=8, method=METHODS["cntp"].replace(strategy=CNTP(3, max_entropy=0.1)))
    answer = complete(lm, "abc", num_return=2, **options)
    assert answer.counts["num_drawn"] >= len(answer.canvas) and answer.counts["num_unsure"] > 0
    assert answer.canvas.tolist() != answer.others[0].canvas.tolist()
    mask = punctuation_mask(lm.tokenizer, lm.cfg.vocab_size)
    given = options["method"].replace(strategy=CNTP(3, max_entropy=0.1, punctuation=mask))
    same = complete(lm, "abc", gen_len=8, method=given, top_p=0.95, num_return=2)
    assert same.canvas.tolist() == answer.canvas.tolist()
    with pytest.raises(ValueError, match="punctuation=None needs a tokenizer"):
        complete(LanguageModel(lm.params, lm.cfg), [1, 2], method="cntp", gen_len=4)


def test_tokens_of_punctuation():
    of_bytes = punctuation_mask(byte_tokenizer(), 300)
    assert of_bytes.shape == (300,)
    assert {chr(i) for i in np.flatnonzero(of_bytes)} == {*MARKS}
    words = word_tokenizer(["a", "b.", ".", " ?", ")\n", ","])
    assert np.flatnonzero(punctuation_mask(words, 8)).tolist() == [2, 5]
    assert np.flatnonzero(punctuation_mask(words, 8, "contains")).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="match='some' must be 'exact' or 'contains'"):
        punctuation_mask(words, 8, "some")


def test_nonsense_is_refused(toy):
    refuse = lambda made: SearchMethod(made, SAMPLING).validate(toy[0])
    check_refusals(CNTP(), refuse, toy[0])
    for made, message in (
        (CNTP(min_entropy=2.0, max_entropy=2.0), "max_entropy=2 must be above min_entropy=2"),
        (CNTP(formula="mine"), "formula='mine' must be 'code' or 'paper'"),
        (CNTP(punctuation=np.zeros(5, bool)), r"punctuation has shape \(5,\), not"),
        (CNTP(punctuation=[True] * 24), "punctuation is a list, which must be an array of bool"),
        (CNTP(min_entropy=-np.inf), "min_entropy=-inf must be a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(made)
