"""The Mosaic GPU kernel: in the interpreter, lowered for CUDA, on a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import hopper
from kernels_pallas.unembed_stats import Noise, gpu, gumbel_noise, summary, unembed_stats
from kernels_pallas.unembed_stats.shapes import STATS
from kernels_pallas.unembed_stats.xla import summarize_xla
from tests.lib.kernels import interpret_gpu, lower_for_cuda, needs_mosaic_gpu

BF16 = jnp.bfloat16


def stats_case(M, D, V, *, first_id=0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(M, D)), BF16)
    head = jnp.asarray(rng.normal(size=(V, D)) * 3 / np.sqrt(D), BF16)
    key = jax.random.bits(jax.random.key(seed), (M, 2), jnp.uint32)
    options = dict(
        banned_ids=jnp.array([first_id + 3, first_id + V - 1, -1]),
        noise=Noise(key, jnp.float32(0.7)),
        given_ids=jnp.asarray(first_id + rng.integers(0, V, size=(M, 3)), jnp.int32),
    )
    return hidden, head, options


def assert_same_summary(got, expected):
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        assert got[name].dtype == column.dtype, name
        # Products are exact in both; sums of 64 to 4096 terms differ in order.
        np.testing.assert_allclose(got[name], column, atol=3e-5, rtol=2e-5, err_msg=name)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("M", "D", "V", "without"),
    [
        (5, 192, 700, ()),
        (100, 64, 300, ("noise",)),
        (130, 64, 256, ("noise", "banned_ids", "given_ids")),
        (300, 64, 300, ("noise",)),
    ],
)
def test_stats_in_the_interpreter(monkeypatch, M, D, V, without):
    monkeypatch.setattr(hopper, "NUM_SMS", 2)  # several items per block, so that buffers are reused
    first_id = 1000 if M < 130 else 0
    hidden, head, options = stats_case(M, D, V, first_id=first_id)
    options |= dict.fromkeys(without)
    arguments = (hidden, head, first_id, *options.values())
    with interpret_gpu():
        got = jax.jit(gpu.summarize_gpu)(*arguments)
    assert_same_summary(got, summarize_xla(*arguments, k=0))


@needs_mosaic_gpu
def test_stats_near_certainty_on_ties_and_with_a_banned_piece():
    """Log-probabilities of 1 - 1e-11, the lower of two equal ids, 128 banned ids in a row."""
    V, D = 512, 64
    head = jnp.zeros((V, D), BF16).at[300, 0].set(32).at[jnp.array([140, 400]), 1].set(8)
    hidden = jnp.zeros((3, D), BF16).at[0, 0].set(1).at[1, 1].set(1)
    with interpret_gpu():
        got = jax.jit(gpu.summarize_gpu)(hidden, head, 0, None, None, None)
    expected = summarize_xla(hidden, head, 0, None, None, None, k=0)
    np.testing.assert_array_equal(got["token"][:, 0], [300, 140, 0])
    np.testing.assert_allclose(got["rest"][0], 511 * np.exp(-32.0), rtol=1e-5)
    assert_same_summary(got, expected)


@needs_mosaic_gpu
def test_merging_pieces_is_the_contracts_merge(monkeypatch):
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(4, 60)) * 5, jnp.float32).at[:, 20:30].set(-jnp.inf)
    z = z.at[0].set(-jnp.inf).at[1, jnp.array([7, 45])].set(30.0)
    noise = Noise(jax.random.bits(jax.random.key(0), (4, 2), jnp.uint32), jnp.float32(1.0))
    pieces = [
        summary.tile_summary(z[:, i : i + 10], i + jnp.arange(10), noise, 0, None)
        for i in range(0, 60, 10)
    ]
    stacked = {name: jnp.stack([p[name][:, 0] for p in pieces]) for name in pieces[0]}
    got = gpu._merge_pieces(stacked)
    expected = functools.reduce(summary.merge, pieces)
    assert got.keys() == expected.keys()
    for name in got:
        real = slice(1, None)  # a row of which all is banned has no arg-max
        np.testing.assert_allclose(got[name][real], expected[name][real], rtol=1e-6, err_msg=name)
        assert not np.isnan(got[name]).any()


@needs_mosaic_gpu
def test_noise_keeps_its_precision_without_log1p():
    """The series and the logarithm against the contract's log1p, over all magnitudes of noise."""
    ids = jnp.arange(64 * 128, dtype=jnp.int32).reshape(64, 128)
    key = jax.random.bits(jax.random.key(0), (64, 2), jnp.uint32)
    words = jax.lax.bitcast_convert_type(key, jnp.int32)
    got = gpu._gumbel_noise(words[:, 0], words[:, 1], ids)
    for row in (0, 17, 63):
        expected = gumbel_noise(key[row : row + 1], ids[row])[0]
        np.testing.assert_allclose(got[row], expected, rtol=3e-6, atol=1e-6)


def stats_arguments(shape):
    abstract = jax.ShapeDtypeStruct
    hidden, head = abstract((shape.M, shape.D), BF16), abstract((shape.V, shape.D), BF16)
    if not shape.has_noise:
        return hidden, head, None
    return hidden, head, Noise(abstract((shape.M, 2), jnp.uint32), abstract((), jnp.float32))


def judge(hidden, head, noise):
    return unembed_stats(hidden, head, noise=noise, banned_ids=jnp.array([5]))


@needs_mosaic_gpu
@pytest.mark.parametrize("name", STATS)
def test_stats_lower_for_cuda_at_real_shapes(name):
    assert "mosaic_gpu" in lower_for_cuda(judge, *stats_arguments(STATS[name]))


@needs_mosaic_gpu
def test_calls_that_are_refused_are_served_by_xla():
    head = jnp.zeros((512, 64), BF16)
    text = lower_for_cuda(lambda h, w: unembed_stats(h, w, k=3), head[:4], head)
    assert "mosaic_gpu" not in text


def test_naming_the_kernel_where_there_is_no_gpu_says_why():
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        unembed_stats(jnp.zeros((1, 64), BF16), jnp.zeros((512, 64), BF16), implementation="gpu")


@pytest.mark.gpu
def test_parity_on_a_device():
    if jax.default_backend() != "gpu" or hopper.refusal():
        pytest.skip("needs a Hopper GPU")
    for M in (5, 100, 300):
        hidden, head, options = stats_case(M, 1024, 5000)
        arguments = (hidden, head, 0, *options.values())
        got = gpu.summarize_gpu(*arguments)
        expected = summarize_xla(*arguments, k=0)
        assert_same_summary(got, expected)
