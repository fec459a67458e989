"""Long texts behind a cache whose states move: by hand, honest, and without any step as ever."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.complete import complete
from decode.core.hso import HSO, Moments, Observed
from decode.long_likelihood import Past, advance, forget, long_log_likelihood
from decode.search.components import Beam, Contrastive
from decode.search.loop import SearchMethod, begin
from dlm import vocab
from dlm.cache import init_cache
from dlm.lm import LanguageModel
from dlm.models import decoder
from dlm.window import Slots, Window
from tests.lib.docs import check_refusals
from tests.lib.kinds import model
from tests.lib.models import laws_of
from tests.lib.tiers import more

W, CONTEXT = 8, 24  # tokens of a window, and that are remembered
HARD = HSO(eta=0.05, num_steps=2, window=W, beta_2=0.99, clip=0.02)


@pytest.fixture(scope="module")
def lm(toy_cfg, toy_params):
    return LanguageModel(toy_params, dataclasses.replace(toy_cfg, mask_token_id=None))


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 20, n).tolist() for n in (45, 38)]


def judge(lm, texts, hso, context=CONTEXT):
    found = long_log_likelihood(lm, texts, hso=hso, window=W, context=context, batch_size=2)
    return [x.log_prob for x in found]


@pytest.fixture(scope="module")
def read(lm):
    """(L, G) of past states [2, L, 1, K, S, H] and a window, and the window's own states."""
    cfg, params = lm.cfg, lm.params
    head = vocab.head(params)

    def forward(states, tokens, start, position):
        cache = init_cache(cfg, 1, 40).replace(k=states[0], v=states[1])
        slots = Slots.append(cache, start[None]).replace(length=jnp.array([64]))
        return decoder.forward(
            params, cfg, Window.at(tokens[None], position[None], is_causal=True), slots
        )

    @jax.jit
    def loss(states, tokens, targets, count, start, position):
        def total(states):
            hidden = forward(states, tokens, start, position).hidden
            z = jax.nn.log_softmax(vocab.logits(head, hidden))[0]
            each = -jnp.take_along_axis(z, targets[:, None], axis=1)[:, 0]
            return jnp.where(jnp.arange(W) < count, each, 0).sum(), each

        gradient, each = jax.grad(total, has_aux=True)(states)
        after = forward(states, tokens, start, position).cache
        return each, gradient, jnp.stack([after.k, after.v])

    def of(states, tokens, targets, start, position):
        pad = lambda x: np.pad(np.int32(x), (0, W - len(x)))
        numbers = (np.int32(x) for x in (len(targets), start, position))
        found = loss(np.float32(states), pad(tokens), pad(targets), *numbers)
        return [np.asarray(x, np.float64) for x in found]

    return of


def by_hand(read, cfg, text, hso, context):
    """Log-probabilities of a text's tokens, and the states at its end, as the card says."""
    shape = (2, cfg.n_layers, 1, cfg.n_kv_heads, 40, cfg.head_dim)
    states, m1, m2 = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    age, filled, found = np.zeros(40), 0, []
    for i in range(0, len(text) - 1, W):
        tokens, targets = text[i : i + W], text[i + 1 : i + W + 1]
        if filled + W > context:
            states, m1, m2 = (np.roll(x, -W, axis=4) for x in (states, m1, m2))
            age, filled = np.roll(age, -W), filled - W
            m1[:, :, :, :, filled:], m2[:, :, :, :, filled:], age[filled:] = 0, 0, 0
        for n in range(hso.num_steps):
            each, g, _ = read(states, tokens, targets, filled, i)
            if n == 0:
                found += list(-each[: len(targets)])
            length = np.sqrt((g**2).sum(axis=(3, 5), keepdims=True))
            g = g * np.minimum(1, hso.clip / np.maximum(length, 1e-30))
            for s in range(filled):
                at = np.s_[:, :, :, :, s]
                age[s] += 1
                m1[at] = hso.beta_1 * m1[at] + (1 - hso.beta_1) * g[at]
                m2[at] = hso.beta_2 * m2[at] + (1 - hso.beta_2) * g[at] ** 2
                mean = m1[at] / (1 - hso.beta_1 ** age[s])
                square = m2[at] / (1 - hso.beta_2 ** age[s])
                states[at] -= hso.eta * mean / (np.sqrt(square) + hso.eps)
        after = read(states, tokens, targets, filled, i)[2]
        states[:, :, :, :, filled : filled + W] = after[:, :, :, :, filled : filled + W]
        filled += W
    return np.array(found), states


@pytest.mark.parametrize(
    "hso", [HARD, *more(HARD.replace(num_steps=1, clip=1e9, eta=0.01), HARD.replace(beta_1=0.0))]
)
def test_windows_by_hand(lm, texts, read, hso):
    """Two texts, one of which ends earlier, of which the oldest tokens are forgotten."""
    plain = judge(lm, texts, None)
    for text, ours, still in zip(texts, judge(lm, texts, hso), plain, strict=True):
        expected, _ = by_hand(read, lm.cfg, text, hso, CONTEXT)
        np.testing.assert_allclose(ours, expected, atol=2e-3)
        assert np.abs(ours - still)[W:].max() > 0.05  # the steps matter


def test_without_steps_it_is_the_ordinary_evaluation(lm, texts):
    """To the bit that of a cache; and, where nothing is forgotten, the laws of whole texts."""
    before = jax.tree.map(np.array, lm.params)
    plain, still = judge(lm, texts, None), judge(lm, texts, HARD.replace(eta=0.0))
    for a, b in zip(plain, still, strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, before, lm.params)  # steps move no parameter
    text = texts[1][:CONTEXT]
    (whole,) = judge(lm, [text], None)
    laws = laws_of(lm.params, lm.cfg, text)[range(len(text) - 1), text[1:]]
    np.testing.assert_allclose(whole, np.log(laws), atol=1e-5)


def test_nothing_is_known_beforehand(lm, texts):
    """Another token changes what is said of it and later ones, of its own text only."""
    other = [texts[0].copy(), texts[1]]
    other[0][20] += 1
    one, two = judge(lm, texts, HARD), judge(lm, other, HARD)
    np.testing.assert_array_equal(one[0][:19], two[0][:19])
    assert one[0][19] != two[0][19] and (one[0][24:] != two[0][24:]).any()
    np.testing.assert_array_equal(one[1], two[1])
    size = advance._cache_size()
    judge(lm, texts, HARD.replace(eta=0.1, num_steps=3, beta_1=0.5, clip=1.0))
    assert advance._cache_size() == size


def window_of(tokens, start):
    tokens = np.array([tokens], np.int32)
    at = np.array([start], np.int32)
    return Observed(tokens[:, :-1], tokens[:, 1:], np.ones((1, W), bool), at, at, at + 64)


def test_gradients_are_differences_and_steps_go_down(lm, texts, read):
    """Along a direction near the gradient; a small step makes the same window more probable."""
    text = texts[0]
    _, states = by_hand(read, lm.cfg, text[: W + 1], HARD, 40)
    tokens, targets = text[W : 2 * W], text[W + 1 : 2 * W + 1]
    loss = lambda states: read(states, tokens, targets, W, W)[0].sum()
    gradient = read(states, tokens, targets, W, W)[1]
    noise = np.random.default_rng(1).normal(size=gradient.shape) * (gradient != 0)
    direction = gradient / np.linalg.norm(gradient) + 0.3 * noise / np.linalg.norm(noise)
    numeric = (loss(states + 0.01 * direction) - loss(states - 0.01 * direction)) / 0.02
    np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-3)

    cache = init_cache(lm.cfg, 1, 40).replace(k=jnp.float32(states[0]), v=jnp.float32(states[1]))
    fit = jax.jit(lambda hso, cache, seen: hso.fit(
        lm.params, lm.cfg, cache, Moments.of(cache), seen
    )[0])  # fmt: skip
    losses = [loss(states)]
    for num_steps in (1, 5):
        hso = HSO(eta=3e-3, num_steps=num_steps, window=W)
        after = fit(hso, cache, window_of(text[W : 2 * W + 1], W))
        losses.append(loss(np.stack([after.k, after.v])))
    assert losses[0] > losses[1] + 0.01 and losses[1] > losses[2] + 0.05


def test_moments_go_with_their_states(lm):
    cache = init_cache(lm.cfg, 2, 16)
    fill = lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)
    cache = jax.tree.map(fill, cache)
    moments = Moments.of(cache)
    first = jax.tree.map(lambda x: fill(x) + 1, moments.first)
    second = jax.tree.map(lambda x: fill(x) + 2, moments.second)
    age = jnp.arange(32).reshape(2, 16)
    past = Past(cache, Moments(first, second, age), jnp.int32(14))
    slid = jax.jit(forget, static_argnums=1)(past, 4)
    assert slid.num_slots == 10
    np.testing.assert_array_equal(slid.moments.age[:, :10], age[:, 4:14])
    for old, new in zip(
        jax.tree.leaves((cache, first, second)),
        jax.tree.leaves((slid.cache, slid.moments.first, slid.moments.second)),
        strict=True,
    ):
        np.testing.assert_array_equal(new[..., :10, :], old[..., 4:14, :])
    for x in jax.tree.leaves((slid.moments.first, slid.moments.second)):
        assert not np.asarray(x[..., 12:, :]).any()


def test_prompts_before_a_search(lm, read):
    """States of what stands before the last w tokens are those of the steps; short prompts stay."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 20, n).tolist() for n in (2 * W + 1, 5, W + 4)]
    method = SearchMethod(Beam(1), adaptation=HARD)
    options = dict(gen_len=4, prompt_len=24, batch_size=4, chunk=8)
    moved, plain = (
        begin(lm.params, lm.cfg, x, prompts, **options).cache
        for x in (method, method.replace(adaptation=HARD.replace(eta=0.0)))
    )
    still = begin(lm.params, lm.cfg, SearchMethod(Beam(1)), prompts, **options).cache
    for b, prompt in enumerate(prompts):
        n = len(prompt) - 1
        of = lambda cache, b=b, n=n: np.stack([cache.k, cache.v])[:, :, b, :, :n]
        np.testing.assert_allclose(of(plain), of(still), atol=1e-5)
        if n <= W:
            np.testing.assert_allclose(of(moved), of(still), atol=1e-5)
    _, states = by_hand(read, lm.cfg, prompts[0], HARD, 40)
    ours = np.stack([moved.k, moved.v])[:, :, 0]
    np.testing.assert_allclose(ours[:, :, :, : 2 * W], states[:, :, 0, :, : 2 * W], atol=2e-3)
    assert np.abs(ours - np.stack([still.k, still.v])[:, :, 0])[..., : 2 * W, :].max() > 0.05


def test_nonsense_is_refused(lm, texts):
    check_refusals(HSO(), lambda hso: judge(lm, texts, hso))
    for arguments, message in (
        (dict(context=7), r"context=7 must be in \[64, 64\]"),
        (dict(batch_size=0, context=64), "batch_size=0 must be at least 1"),
        (dict(window=0), "window=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            long_log_likelihood(lm, texts, **arguments)
    with pytest.raises(ValueError, match="text 1 has 1 tokens; it must have at least 2"):
        long_log_likelihood(lm, [[1, 2], [3]], context=64)
    learned = dataclasses.replace(
        lm, cfg=dataclasses.replace(lm.cfg, learned_positions=True, max_seq_len=30)
    )
    with pytest.raises(ValueError, match="text 0 has 45 tokens, of which all but the last must be"):
        judge(learned, texts, HARD)
    never = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, never_causal=True))
    with pytest.raises(ValueError, match="never learned to read from left to right"):
        long_log_likelihood(never, texts)
    with pytest.raises(ValueError, match="adaptation=3 must be of class HSO, or None"):
        SearchMethod(Beam(), adaptation=3).validate(lm.cfg)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["every other has experts", "gemma", "apart"])
def test_other_models(name, lm, texts, monkeypatch):
    """With experts, with sliding layers, and with a cache whose layers lie apart."""
    if name == "apart":
        monkeypatch.setattr("dlm.cache.APART_BYTES", 0)
        lm = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, max_seq_len=63))  # compiles
    else:
        cfg, params = model(name, max_seq_len=64)
        lm = LanguageModel(params, cfg)
    plain, still, moved = (judge(lm, texts, x) for x in (None, HARD.replace(eta=0.0), HARD))
    for a, b, c in zip(plain, still, moved, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.isfinite(c).all() and np.abs(a - c)[W:].max() > 0.01
    method = SearchMethod(Beam(1), adaptation=HARD)
    cache = begin(lm.params, lm.cfg, method, [texts[0][:20]], gen_len=4).cache
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(cache))


@pytest.mark.exhaustive
def test_any_strategy_writes_behind_adapted_prompts(lm, texts):
    """Rows that are replaced write what they write in a whole batch; steps change some of it."""
    prompts = [text[i : i + 15] for text in texts for i in (0, 9, 20)]
    for strategy in (Contrastive(k=2), Beam(2)):
        method = SearchMethod(strategy, adaptation=HARD)
        answers = lambda method, n: [
            x.tokens.tolist() for x in complete(lm, prompts, method=method, gen_len=6, batch_size=n)
        ]
        assert answers(method, 6) == answers(method, 2) != answers(SearchMethod(strategy), 6)
