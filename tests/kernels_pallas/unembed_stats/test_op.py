import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from kernels_pallas.unembed_stats import (
    Noise,
    gumbel_noise,
    logits_stats,
    threefry2x32,
    unembed_logits,
    xla,
)
from kernels_pallas.unembed_stats import unembed_stats as in_operations
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more
from tests.lib.vocabulary import assert_same, random_case

unembed_stats = as_one_program(in_operations)


def cut(monkeypatch, tile):
    """Has the XLA implementation take that many vocabulary entries at a time."""
    monkeypatch.setattr(xla, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(xla, "VOCAB_TILE", tile)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("vocab", "tile"),
    [(300, 100), (257, 16384), *more((300, 32), (300, 299), (300, 300), (257, 32), (257, 100))],
)
def test_tiled_equals_reference(monkeypatch, tile, vocab):
    cut(monkeypatch, tile)
    hidden, head = random_case(V=vocab)
    key = jax.random.bits(jax.random.key(1), (7, 2), jnp.uint32)
    options = dict(
        banned_ids=jnp.array([3, vocab - 1, -1]),
        noise=Noise(key, jnp.float32(0.7)),
        k=5,
        given_ids=jnp.tile(jnp.array([[0, 150, vocab - 2]]), (7, 1)),
    )
    got = unembed_stats(hidden, head, **options)
    assert_same(got, unembed_stats(hidden, head, implementation="reference", **options))
    logits = unembed_logits(hidden, head, options.pop("banned_ids"))
    assert_same(got, logits_stats(logits, **options))


@pytest.mark.parametrize("num_rows", [7, 20])
def test_equals_float64_softmax(monkeypatch, num_rows):
    """Also of rows that a CPU goes through at once, in tiles."""
    cut(monkeypatch, 100)
    hidden, head = random_case(num_rows)
    stats = unembed_stats(hidden, head)
    z = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    p = scipy.special.softmax(z, axis=-1)
    ordered = np.sort(p, axis=-1)
    np.testing.assert_array_equal(stats.token, z.argmax(-1))
    np.testing.assert_allclose(np.exp(stats.log_prob), ordered[:, -1], rtol=1e-5)
    np.testing.assert_allclose(np.exp(stats.second_log_prob), ordered[:, -2], rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, scipy.stats.entropy(p, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(stats.logsumexp, scipy.special.logsumexp(z, axis=-1), rtol=1e-5)


def test_capped_logits(monkeypatch):
    """cap tanh(z / cap): less certain, in the same order."""
    cut(monkeypatch, 100)
    hidden, head = random_case()
    stats = unembed_stats(hidden, head, k=3, cap=2.0)
    z = 2 * np.tanh(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / 2)
    np.testing.assert_allclose(unembed_logits(hidden, head, cap=2.0), z, rtol=1e-4, atol=1e-5)
    log_p = scipy.special.log_softmax(z, axis=-1)
    np.testing.assert_allclose(
        stats.entropy, scipy.stats.entropy(np.exp(log_p), axis=-1), rtol=1e-4
    )
    np.testing.assert_allclose(stats.top_log_probs, -np.sort(-log_p)[:, :3], rtol=1e-4)
    assert_same(stats, unembed_stats(hidden, head, k=3, cap=2.0, implementation="reference"))


def test_near_certainty_keeps_its_order():
    """Gaps of 25 and 30 nats are both probability 1.0 in float32, but not in log_prob."""
    logits = jnp.array([[25.0, 0.0, 0.0], [30.0, 0.0, 0.0]])
    stats = logits_stats(logits)
    np.testing.assert_array_equal(np.exp(stats.log_prob), 1.0)
    assert stats.log_prob[0] < stats.log_prob[1] < 0
    assert stats.entropy[0] > stats.entropy[1] > 0
    np.testing.assert_allclose(stats.log_prob, -2 * np.exp([-25.0, -30.0]), rtol=1e-5)
    np.testing.assert_allclose(stats.entropy[0], 2 * np.exp(-25.0) * 26, rtol=1e-4)


def test_ties_go_to_the_lowest_id_in_every_tiling(monkeypatch):
    head = jnp.zeros((64, 4)).at[jnp.array([9, 40])].set(1.0)
    for num_rows, tile in ((2, 64), (2, 16), (2, 7), (16, 16)):
        cut(monkeypatch, tile)
        stats = unembed_stats(jnp.ones((num_rows, 4)), head)
        np.testing.assert_array_equal(stats.token, 9)
        np.testing.assert_allclose(stats.second_log_prob, stats.log_prob)


def test_a_tile_that_is_banned_as_a_whole_contributes_nothing(monkeypatch):
    hidden, head = random_case(V=40)
    cut(monkeypatch, 10)
    for banned in (range(10), range(10, 20), range(30, 40)):
        ids = jnp.array(list(banned))
        got = unembed_stats(hidden, head, banned_ids=ids, k=3)
        expected = unembed_stats(hidden, head, banned_ids=ids, k=3, implementation="reference")
        assert_same(got, expected)
        assert not np.isin(got.token, banned).any()


def test_more_tops_than_a_tile_has(monkeypatch):
    hidden, head = random_case(3, 4, 30)
    cut(monkeypatch, 7)
    got = unembed_stats(hidden, head, k=12)
    assert_same(got, unembed_stats(hidden, head, k=12, implementation="reference"))


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_more_tops_than_a_device_has_tokens():
    hidden, head = random_case(3, 4, 24)
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    read = functools.partial(in_operations, k=20, vocab_axis="tensor")
    specs = dict(in_specs=(P(), P("tensor")), out_specs=P(), check_vma=False)
    got = jax.jit(jax.shard_map(read, mesh=mesh, **specs))(hidden, head)
    assert_same(got, unembed_stats(hidden, head, k=20, implementation="reference"))


@settings(max_examples=3)
@given(st.integers(1, 5), st.integers(2, 90), st.integers(1, 90), st.integers(0, 1000))
def test_any_shape_and_tile(M, V, tile, seed):
    hidden, head = random_case(M, 4, V, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, tile)
        got = unembed_stats(hidden, head)
    assert_same(got, unembed_stats(hidden, head, implementation="reference"), atol=5e-5)


def test_samples_follow_the_tempered_law():
    V, M, temperature = 6, 200_000, 0.6
    z = np.array([0.0, 1.0, 2.0, -1.0, 0.5, 2.5], np.float32)
    key = jax.random.bits(jax.random.key(3), (M, 2), jnp.uint32)
    noise = Noise(key, jnp.float32(temperature))
    stats = unembed_stats(jnp.ones((M, 1)), jnp.asarray(z)[:, None], noise=noise)
    expected = scipy.special.softmax(z.astype(np.float64) / temperature) * M
    assert scipy.stats.chisquare(np.bincount(stats.sample, minlength=V), expected).pvalue > 1e-3
    log_probs = np.log(
        scipy.special.softmax(z)
    )  # confidence is that of the law without temperature
    np.testing.assert_allclose(stats.sample_log_prob, log_probs[stats.sample], atol=1e-5)


def test_gumbel_noise_has_its_tail():
    """A 24-bit uniform cannot exceed 16.6; two words reach what a million draws per row need."""
    ids = jnp.arange(1_000_000)
    draws = np.asarray(gumbel_noise(jnp.array([[1, 2]], jnp.uint32), ids)).ravel()
    assert scipy.stats.kstest(draws, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    assert np.isfinite(draws).all()


@pytest.mark.exhaustive(every=4)
def test_noise_depends_on_row_and_id_only():
    key = jax.random.bits(jax.random.key(3), (3, 2), jnp.uint32)
    whole = gumbel_noise(key, jnp.arange(50))
    np.testing.assert_array_equal(gumbel_noise(key[1:2], jnp.arange(20, 30)), whole[1:2, 20:30])


def test_threefry_is_the_published_cipher():
    """Known-answer vectors of the Random123 distribution."""
    word = lambda x: jnp.array(x, jnp.uint32)
    cases = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, expected in cases:
        got = threefry2x32(*map(word, key), *map(word, counter))
        assert tuple(int(x) for x in got) == expected


def test_logits_are_never_stored_for_a_large_vocabulary():
    """The compiled program's temporaries stay far below [M, V] float32, but for a few rows."""
    M, D, V = 128, 8, 8 * 16384
    compiled = (
        jax.jit(lambda h, w: unembed_stats(h, w))
        .lower(jnp.zeros((M, D)), jnp.zeros((V, D)))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < M * V * 4 / 2


def test_a_few_rows_need_no_copy_of_the_head():
    """Tiles would be cut from the head, and copied, before they are multiplied."""
    run = jax.jit(lambda h, w: unembed_stats(h, w, k=3))
    for M, is_tiled in ((2, False), (128, True)):
        text = run.lower(jnp.zeros((M, 8)), jnp.zeros((8 * 16384, 8))).as_text()
        assert ("stablehlo.while" in text) == is_tiled, M


def test_bad_shapes_and_implementations_are_refused():
    with pytest.raises(ValueError, match="must be"):
        unembed_stats(jnp.zeros((2, 3)), jnp.zeros((4, 5)))
    with pytest.raises(NotImplementedError, match="'xla', 'tpu', 'gpu' or 'reference'"):
        unembed_stats(jnp.zeros((2, 3)), jnp.zeros((5, 3)), implementation="metal")
