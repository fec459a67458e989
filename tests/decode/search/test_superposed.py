"""Superposed decoding: drafts that share a row, against laws of means and counted n-grams."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.complete import complete
from decode.core.datastore import Datastore, build_datastore, load_datastore
from decode.search import judge
from decode.search.components import Superposed
from decode.search.contracts import NEVER, Round, exists
from decode.search.loop import SearchMethod, begin, decode, step
from dlm import vocab
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.window import Window
from tests.lib.docs import check_refusals
from tests.lib.jitted import as_one_program
from tests.lib.models import hidden_of, markov
from tests.lib.search import ending, found, search
from tests.lib.tiers import more

K = 3
SHAPES = dict(prompt_len=13, canvas_len=10, batch_size=8)  # one program for all


@pytest.fixture(scope="module")
def toy(toy_cfg, toy_params):
    cfg, prompts = ending(toy_cfg, toy_params)
    return cfg, toy_params, prompts


@pytest.fixture(scope="module")
def corpus(toy):
    """Texts in which some of what the model says comes up, and some does not."""
    rng, ids = np.random.default_rng(3), np.delete(np.arange(24), toy[0].eos_token_id)
    return [rng.choice(ids, rng.integers(2, 90)).tolist() for _ in range(40)]


@pytest.fixture(scope="module")
def store(toy, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    build_datastore(corpus, toy[0].vocab_size, folder)
    return load_datastore(folder)


@pytest.fixture(scope="module")
def law(toy):
    """log p behind a row of vectors, the model's inputs, as float64 [V]."""
    cfg, params, _ = toy

    @jax.jit
    def read(vectors, length):
        n = len(vectors)
        window = Window.at(jnp.zeros((1, n), jnp.int32), jnp.zeros(1, jnp.int32), is_causal=True)
        out = decoder.forward(params, cfg, window.replace(mix=(jnp.ones((1, n)), vectors[None])))
        logits = vocab.logits(vocab.head(params), out.hidden[:, length - 1])
        return jax.nn.log_softmax(logits)[0]

    def of(vectors):
        padded = np.zeros((32, cfg.d_model), np.float32)
        padded[: len(vectors)] = vectors
        return np.asarray(read(padded, len(vectors)), np.float64)

    return of


def behind(corpus, longest=5):
    """How often what stands behind each context of at most so many tokens; -1: a text's end."""
    found = collections.defaultdict(collections.Counter)
    for text in corpus:
        for i, n in itertools.product(range(len(text)), range(1, longest + 1)):
            if i + n <= len(text):
                found[tuple(text[i : i + n])][(*text, -1)[i + n]] += 1
    return found


def share(counts, context, token):
    """Of all that follows a context, how much is the token."""
    of_context = counts.get(tuple(context), collections.Counter({-2: 1}))
    return of_context[token] / of_context.total()


def by_hand(law, embed, counts, prompt, m, gen_len, eos):
    """As the card says: (score, tokens), the best first."""
    k, vectors = m.num_drafts, [embed[t] for t in prompt]
    drafts, aside = [(0.0, ())], []
    for _ in range(gen_len):
        log_p = law(vectors)
        kept = np.argsort(-log_p, kind="stable")[: m.num_kept]
        p = log_p[kept] / m.temperature
        p -= p.max() + np.log(np.exp(p - p.max()).sum())
        every = []
        for score, text in drafts:
            whole = (*prompt, *text)
            q = [
                sum(
                    c * share(counts, whole[len(whole) - n :], -1 if v == eos else int(v))
                    for n, c in enumerate(m.orders, 1)
                    if n <= len(whole)
                )
                for v in kept
            ]
            for v, log, of_ngrams in zip(kept, p, q, strict=True):
                gain = (1 - m.alpha) * log
                if not any(q):
                    gain -= m.penalty
                elif m.alpha > 0:
                    if of_ngrams == 0:
                        continue
                    gain += m.alpha * np.log(of_ngrams)
                every.append((score + gain, (*text, int(v))))
        every = sorted(every, key=lambda x: -x[0])[: 2 * k]
        aside = sorted(aside + [x for x in every[:k] if x[1][-1] == eos], key=lambda x: -x[0])[:k]
        drafts = [x for x in every if x[1][-1] != eos][:k]
        if len(aside) == k or not drafts:
            return aside
        scores = np.array([score for score, _ in drafts])
        a = np.exp(scores - scores.max())
        a /= a.sum()
        vectors.append(sum(x * embed[text[-1]] for x, (_, text) in zip(a, drafts, strict=True)))
    return sorted([*aside, *drafts], key=lambda x: -x[0])[:k]


@pytest.mark.parametrize(
    "numbers",
    [
        {},
        *more(
            {"alpha": 0.0},
            {"alpha": 0.2, "temperature": 1.0},
            {"alpha": 1.0, "temperature": 0.5, "penalty": 3.0},
            {"orders": (1.0, 0.0, 0.0, 2.0, 0.5), "temperature": 0.3},
        ),
    ],
)
def test_drafts_by_hand(toy, law, corpus, store, numbers):
    cfg, params, prompts = toy
    made = Superposed(store, num_drafts=K, **numbers)
    _, ours = search(toy, SearchMethod(made, num_return=K), gen_len=8, **SHAPES)
    embed, counts, eos = np.asarray(params["embed"]), behind(corpus), cfg.eos_token_id
    ended = 0
    for b, prompt in enumerate(prompts):
        expected = by_hand(law, embed, counts, prompt, made, 8, eos)
        for r, (score, text) in enumerate(expected):
            assert found(ours, b, r) == list(text)
            # A sharp law makes more of roundings, from round to round.
            np.testing.assert_allclose(ours.score[b, r], score, rtol=1e-4, atol=0.1)
            ended += text[-1] == eos
        assert not exists(ours.score[b, len(expected) :]).any()
    assert ended > 0 or numbers


@pytest.mark.parametrize("temperature", [0.06, *more(1e-3, 20.0)])
def test_one_draft_without_ngrams_is_the_greedy_text(toy, law, store, temperature):
    cfg, params, prompts = toy
    made = Superposed(store, num_drafts=1, alpha=0.0, temperature=temperature)
    _, ours = search(toy, SearchMethod(made), **SHAPES)
    for b, prompt in enumerate(prompts):
        vectors, greedy = [params["embed"][t] for t in prompt], []
        while len(greedy) < 10 and cfg.eos_token_id not in greedy:
            greedy.append(int(np.argmax(law(vectors))))
            vectors.append(params["embed"][greedy[-1]])
        assert found(ours, b) == greedy


def test_weights_add_up_and_drafts_differ(toy, store):
    """In every round; the cache has a row per prompt, in which nothing is moved."""
    cfg, params, prompts = toy
    method = SearchMethod(Superposed(store, num_drafts=K), num_return=K)
    state = begin(params, cfg, method, prompts, gen_len=8, chunk=8, **SHAPES)
    for _ in range(5):
        state = decode(params, cfg, method, state, 1)
        weights = np.asarray(as_one_program(method.strategy.weights)(state.score))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
        for b, length in enumerate(np.asarray(state.length)):
            alive = exists(np.asarray(state.score[b]))
            drafts = [tuple(row[:length]) for row in np.asarray(state.tokens[b])[alive].tolist()]
            assert len(set(drafts)) == len(drafts)
    assert state.cache.k.shape[1] == 8 and not np.asarray(state.num_moves).any()
    assert np.asarray(state.num_forwards).max() == 5


@pytest.mark.parametrize("num", [3, 7])
def test_a_forward_has_one_row_per_prompt(toy, store, num, monkeypatch):
    cfg, params, prompts = toy
    shapes, forward = [], decoder.forward
    monkeypatch.setattr(
        judge.decoder, "forward",
        lambda *a, **k: shapes.append(a[2].tokens.shape) or forward(*a, **k),
    )  # fmt: skip
    method = SearchMethod(Superposed(store, num_drafts=num))
    start = lambda: begin(params, cfg, method, prompts, gen_len=8, chunk=8, **SHAPES)
    state = jax.eval_shape(start)
    shapes.clear()
    jax.eval_shape(lambda state: step(params, cfg, method, state), state)
    assert shapes == [(8, 1)]


def law_of_mean(cfg, params, tokens, scores):
    """Logits [V] behind candidates that share a row, in the first round, and each one's own."""
    store = Superposed.example(cfg).datastore
    method = SearchMethod(Superposed(store, num_drafts=len(tokens), num_kept=cfg.vocab_size))
    head = vocab.head(params)

    @jax.jit
    def read(state, tokens, scores):
        given = state.replace(candidates=tokens[None, :, None], score=scores[None])
        return vocab.logits(head, judge.read(params, cfg, method, given)[0])[0, 0, 0]

    state = begin(params, cfg, method, [[3, 1, 2]], gen_len=4, chunk=4)
    mean = read(state, np.int32(tokens), np.float32(scores))
    alone = [read(state, np.int32([t] * len(tokens)), np.zeros(3, np.float32)) for t in tokens]
    return np.asarray(mean), np.asarray(alone)


def test_drafts_that_end_alike_say_what_each_says(toy):
    """The mean of one vector is that vector, whatever the weights are."""
    cfg, params, _ = toy
    mean, alone = law_of_mean(cfg, params, [5, 5, 5], [0.3, -2.0, 1.0])
    np.testing.assert_allclose(mean, alone[0], atol=1e-5)
    ordinary = hidden_of(params, cfg, [3, 1, 5])[-1] @ np.asarray(vocab.head(params)).T
    np.testing.assert_allclose(mean, ordinary, atol=2e-5)


def test_a_linear_model_says_the_mean():
    """Logits linear in the embedding, which an entry of 1000 keeps the norm from changing."""
    V = 8
    params, cfg = markov(np.full((V, V), 1 / V))
    cfg = dataclasses.replace(cfg, d_model=V + 1)
    rng = np.random.default_rng(0)
    embed = np.concatenate([rng.normal(size=(V, V)), np.full((V, 1), 1e3)], axis=1)
    unembed = np.concatenate([300 * rng.normal(size=(V, V)), np.zeros((V, 1))], axis=1)
    wider = lambda x: np.zeros([V + 1 if n == V else n for n in x.shape], np.float32)
    params = jax.tree.map(wider, params) | {
        "embed": np.float32(embed), "unembed": np.float32(unembed),
        "final_norm": np.ones(V + 1, np.float32),
    }  # fmt: skip
    params = jax.device_put(params)
    scores = [0.5, -1.0, 0.1]
    mean, alone = law_of_mean(cfg, params, [1, 6, 2], scores)
    a = np.exp(scores) / np.exp(scores).sum()
    assert np.ptp(alone, axis=0).min() > 0.1
    np.testing.assert_allclose(mean, a @ alone, atol=2e-5)


def test_a_prompt_alone_and_in_a_batch(toy, store):
    """The same; other numbers compile nothing."""
    method = SearchMethod(Superposed(store, num_drafts=K), num_return=K)
    _, together = search(toy, method, **SHAPES)
    for b in (0, 5):
        _, alone = search(toy, method, [toy[2][b]], **SHAPES)
        for r in range(K):
            assert found(alone, 0, r) == found(together, b, r)
        np.testing.assert_allclose(alone.score[0], together.score[b], rtol=1e-5)
    size = decode._cache_size()
    strategy = method.strategy.replace(temperature=1.0, alpha=0.1, penalty=7.0, orders=(1.0,) * 5)
    _, other = search(toy, method.replace(strategy=strategy), **SHAPES)
    assert decode._cache_size() == size
    assert [found(other, b) for b in range(8)] != [found(together, b) for b in range(8)]


@pytest.mark.exhaustive
def test_rows_that_are_replaced_find_the_same(toy, store):
    cfg, params, prompts = toy
    lm = LanguageModel(params, cfg)
    method = SearchMethod(Superposed(store, num_drafts=K))
    options = dict(gen_len=[3, 9, 5, 10, 2, 7, 10, 4], method=method, num_return=3)
    whole, refilled = (complete(lm, prompts, **options, batch_size=n) for n in (8, 3))
    for a, b in zip(whole, refilled, strict=True):
        assert [x.tokens.tolist() for x in (a, *a.others)] == [
            x.tokens.tolist() for x in (b, *b.others)
        ]


def test_shares_are_counted(corpus, store):
    """Of contexts that come up, that do not, and that are longer than the text."""
    rng, counts = np.random.default_rng(1), behind(corpus)
    some = [text[i : i + 4] for text in corpus[:9] for i in range(0, len(text) - 3, 7)]
    contexts = [context[:3] for context in some] + rng.integers(0, 22, (5, 3)).tolist()
    tokens = [[context[3], 1, -1] for context in some] + [[1, 2, -1]] * 5
    contexts += [[-1, -1, corpus[0][-1]]]
    tokens += [[0, 5, -1]]
    shares = np.asarray(as_one_program(store.shares)(np.int32(contexts), np.int32(tokens)))
    for row, context, those in zip(shares, contexts, tokens, strict=True):
        for n in (1, 2, 3):
            known = -1 not in context[3 - n :]
            expected = [known * share(counts, context[3 - n :], t) for t in those]
            np.testing.assert_allclose(row[n - 1], expected, rtol=1e-6)
    assert (shares[-1, 0, 2] > 0) and not shares[-1, 1:].any()


def test_tokens_that_are_not_allowed_are_no_drafts(toy, store):
    """Not where one alone is: neither the end of a text nor tokens with a bias of -inf."""
    made = Superposed(store, num_drafts=2, num_kept=4, temperature=9.0)
    of_all = lambda x: jnp.broadcast_to(jnp.array(x), (1, 2, 1, 4))
    at = lambda *values: jnp.array(values, jnp.int32)
    eos = toy[0].eos_token_id

    def choice(alpha):
        seen = Round(
            best=lambda k: (of_all([23, eos, 22, 21]), of_all([0.0, NEVER, -jnp.inf, NEVER])),
            log_probs=None, probs=None, stats=None, hidden=None, candidates=None,
            tokens=jnp.full((1, 2, 8), 20, jnp.int32), log_prob=jnp.zeros((1, 2, 3)),
            length=at(4), prompt_len=at(4), end=at(6), is_first=at(1) > 0,
            is_end=lambda tokens: tokens == eos, embed=None, score=jnp.zeros((1, 2)), key=None,
            active=at(1) > 0,
        )  # fmt: skip
        return made.replace(alpha=alpha).choose(seen, made.init(toy[0], 1, 8, 3))

    choose = jax.jit(choice)
    for alpha in (0.5, 1.0):
        chosen = choose(alpha)
        assert (np.asarray(chosen.state.score) <= NEVER / 2).all()
        score = np.asarray(chosen.score[0])
        assert (score > NEVER / 2).tolist() == [True, False] and chosen.token[0, 0] == 23


def test_nonsense_is_refused(toy, store):
    made = Superposed(store)
    check_refusals(made, lambda made: SearchMethod(made).validate(toy[0]), toy[0])
    for orders in ((), (1.0, -0.1), (0.0,) * 32):
        with pytest.raises(ValueError, match="orders="):
            made.replace(orders=orders).validate(toy[0])
    other = Datastore(store.tokens, store.suffixes, 99)
    with pytest.raises(ValueError, match="a vocabulary of 99 tokens and the target has 24"):
        Superposed(other).validate(toy[0])
