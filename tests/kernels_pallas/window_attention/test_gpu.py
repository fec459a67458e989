"""The Mosaic GPU kernel: in the interpreter, lowered for CUDA, on a device.

The interpreter has no wgmma whose left operand is in registers, so `_weigh` is replaced by a plain
product there: everything around it (copies, barriers, masks, softmax, shares) is what runs on a
GPU. Layouts, swizzles and synchronisation inside wgmma are not checked by the interpreter; the
compilation test of `tests/kernels_pallas/test_hopper.py` checks that they are accepted, the device
test that they are right.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dlm.cache import init_cache
from dlm.config import ModelConfig
from kernels_pallas import hopper
from kernels_pallas.window_attention import (
    Near,
    gpu,
    window_attention,
    window_attention_reference,
)
from kernels_pallas.window_attention.shapes import ATTENTION
from tests.lib.kernels import interpret_gpu, lower_for_cuda, needs_mosaic_gpu

BF16 = jnp.bfloat16


def weigh(weights, values):
    """`gpu._weigh` in terms that the interpreter has."""
    values = values[...]
    plgpu.commit_smem()  # an ordinary read, unlike wgmma's, is not ordered before the next copy
    return jnp.dot(weights, values, preferred_element_type=jnp.float32)


def attention_case(rng, B, T, S, N, K, H, mask):
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), BF16)
    if mask == "bits":
        words = rng.integers(0, 2**32, size=(B, T, -(-T // 32)), dtype=np.uint32)
        mask = jnp.asarray(words).at[:, -1].set(0)  # the last query may see nothing of the window
    cache = (make(2, B, K, S, H), make(2, B, K, S, H))
    return make(B, T, N, H), make(B, T, K, H), make(B, T, K, H), mask, cache


def expected_attention(q, k, v, mask, window_range, cache, ranges):
    floats = [x.astype(jnp.float32) for x in (q, k, v)]
    cache = tuple(x.astype(jnp.float32) for x in cache)
    return window_attention_reference(*floats, mask, window_range, cache, ranges, 1)


# One case per way through the kernel: one or two groups of rows, one or several shares of keys.
CASES = {
    "one share, ragged": (1, 5, 2, 2, 64, "full", 190, [[[3, 130], [140, 190]]], None),
    "two row groups, tiles of 128": (1, 17, 8, 2, 64, "causal", 200, [[[0, 200]]], None),
    "bits, window over two tiles": (1, 70, 1, 1, 64, "bits", 70, [[[0, 70]]], None),
    "grouped heads of 128": (2, 5, 7, 1, 128, "causal", 150, [[[100, 150]], [[0, 9]]], None),
    "rows that see nothing": (2, 4, 2, 2, 64, "full", 64, [[[0, 0]], [[5, 5]]], [[0, 0], [1, 3]]),
    "cache shorter than a tile": (1, 3, 4, 1, 64, "bits", 11, [[[0, 4], [7, 11]]], [[0, 3]]),
    "buffers reused": (1, 5, 1, 1, 64, "full", 600, [[[0, 600]]], None),
    "buffers reused, two row groups": (1, 40, 2, 1, 64, "bits", 600, [[[0, 600]]], None),
    "three shares": (1, 6, 1, 1, 64, "causal", 700, [[[10, 700]]], None),
    "three shares, two row groups": (1, 17, 4, 1, 64, "bits", 700, [[[0, 20], [650, 700]]], None),
}


@needs_mosaic_gpu
@pytest.mark.parametrize("case", CASES)
def test_attention_in_the_interpreter(monkeypatch, case):
    B, T, N, K, H, mask, S, ranges, window_range = CASES[case]
    q, k, v, mask, cache = attention_case(np.random.default_rng(len(case)), B, T, S, N, K, H, mask)
    ranges = jnp.array(ranges)
    window_range = None if window_range is None else jnp.array(window_range)
    exact = expected_attention(q, k, v, mask, window_range, cache, ranges)
    if "reused" in case:  # more tiles than buffers
        monkeypatch.setattr(hopper, "NUM_SMS", 1)
        assert gpu.plan(B, T, S, N, K, H, 2).splits == 1
    if "three shares" in case:
        assert gpu.plan(B, T, S, N, K, H, 2).splits == 3
    # What no range touches may be anything.
    slot = jnp.arange(S)[None, None]
    is_read = ((slot >= ranges[..., :1]) & (slot < ranges[..., 1:])).any(axis=1)
    cache = tuple(jnp.where(is_read[None, :, None, :, None], c, jnp.nan) for c in cache)
    if B > 1:  # so may rows that are not the window's
        other = ((0, 0), (0, 1), *[(0, 0)] * 3)
        cache = tuple(jnp.pad(c, other, constant_values=jnp.nan) for c in cache)
    monkeypatch.setattr(gpu, "_weigh", weigh)
    with interpret_gpu():
        got = jax.jit(
            lambda layer, *a: gpu.window_attention_gpu(
                *a[:3], mask, window_range, cache, ranges, layer
            )
        )(1, q, k, v)
    got = np.asarray(got, np.float32)
    # Weights and output are rounded to 8 bits, values are about 3 at most: two roundings of 2^-9.
    np.testing.assert_allclose(got, exact, atol=2e-2)
    sees_nothing = np.abs(exact).max(axis=-1) == 0
    assert sees_nothing.any() == (case == "rows that see nothing")
    np.testing.assert_array_equal(got[sees_nothing], 0)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    "case", ["grouped heads of 128", "bits, window over two tiles", "three shares"]
)
def test_limited_sight_scale_and_cap_in_the_interpreter(monkeypatch, case):
    """Text in order in the first row; in others keys stand anywhere."""
    B, T, N, K, H, mask, S, ranges, _ = CASES[case]
    rng = np.random.default_rng(7)
    q, k, v, mask, cache = attention_case(rng, B, T, S, N, K, H, mask)
    cached = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    cached[0] = np.arange(S)
    positions = S - 3 + np.tile(np.arange(T, dtype=np.int32), (B, 1))
    near = Near(np.int32(max(S // 3, 4)), positions, cached)
    options = dict(scale=0.2, cap=2.0)
    exact = window_attention_reference(
        *(x.astype(jnp.float32) for x in (q, k, v)), mask, None,
        tuple(x.astype(jnp.float32) for x in cache), jnp.array(ranges), 1, near, **options,
    )  # fmt: skip
    monkeypatch.setattr(gpu, "_weigh", weigh)
    with interpret_gpu():
        got = jax.jit(
            lambda layer, near, *a: gpu.window_attention_gpu(
                *a, mask, None, cache, jnp.array(ranges), layer, near, **options
            )
        )(1, near, q, k, v)
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, atol=2e-2)
    far = expected_attention(q, k, v, mask, None, cache, jnp.array(ranges))
    assert np.abs(np.asarray(exact) - far).max() > 0.1


def attention_arguments(shape):
    """Abstract q, k, v, mask bits, cache, ranges of a named shape."""
    abstract = jax.ShapeDtypeStruct
    q = abstract((shape.B, shape.T, shape.N, shape.H), BF16)
    k = abstract((shape.B, shape.T, shape.K, shape.H), BF16)
    bits = None
    if shape.mask == "bits":
        bits = abstract((shape.B, shape.T, -(-shape.T // 32)), jnp.uint32)
    if not shape.S:
        return q, k, k, bits, None, None
    cache = (abstract((2, shape.B, shape.K, shape.S, shape.H), BF16),) * 2
    return q, k, k, bits, cache, abstract((shape.B, shape.num_ranges, 2), jnp.int32)


def attend(shape, q, k, v, bits, cache, ranges):
    mask = shape.mask if bits is None else bits
    return window_attention(q, k, v, mask=mask, cache=cache, cache_ranges=ranges, layer=1)


def near_arguments(shape):
    """Those of `attend_near`."""
    abstract = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    cached = abstract(shape.B, shape.S) if shape.S else None
    near = Near(abstract(), abstract(shape.B, shape.T), cached)
    return near, *attention_arguments(shape)


def attend_near(shape, near, q, k, v, bits, cache, ranges):
    mask = shape.mask if bits is None else bits
    return window_attention(
        q, k, v, mask=mask, cache=cache, cache_ranges=ranges, layer=1, near=near, cap=30.0
    )[0]


@needs_mosaic_gpu
@pytest.mark.parametrize("name", ["llama3_8b token", "llama3_8b tree", "llama3_8b prefill"])
def test_limited_sight_and_caps_lower_for_cuda(name):
    shape = ATTENTION[name]
    text = lower_for_cuda(functools.partial(attend_near, shape), *near_arguments(shape))
    assert "mosaic_gpu" in text


@needs_mosaic_gpu
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_lowers_for_cuda_at_real_shapes(name):
    shape = ATTENTION[name]
    text = lower_for_cuda(functools.partial(attend, shape), *attention_arguments(shape))
    assert "mosaic_gpu" in text


def attend_cache(q, cache):
    ranges = jnp.array([[[0, 100]]])
    return window_attention(q, q, q, cache=cache, cache_ranges=ranges, layer=0)


@needs_mosaic_gpu
@pytest.mark.parametrize("num_slots", [1, 100, 130, 1089])
def test_attention_reads_caches_of_any_length_that_init_cache_makes(num_slots):
    cfg = ModelConfig(
        d_model=128, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=64, d_ff=64, vocab_size=32,
        max_seq_len=2048, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    cache = init_cache(cfg, 1, num_slots)
    q = jnp.zeros((1, 4, 2, 64), BF16)
    assert "mosaic_gpu" in lower_for_cuda(lambda q: attend_cache(q, (cache.k, cache.v)), q)


@needs_mosaic_gpu
def test_calls_that_are_refused_are_served_by_xla():
    q = jnp.zeros((1, 4, 2, 64))
    text = lower_for_cuda(lambda q: window_attention(q, q, q), q)
    assert "mosaic_gpu" not in text
    cached = (jnp.zeros((1, 1, 2, 130, 64), BF16),) * 2  # slots that TMA cannot read in tiles
    text = lower_for_cuda(lambda q: attend_cache(q.astype(BF16), cached), q)
    assert "mosaic_gpu" not in text


@needs_mosaic_gpu
def test_offering_the_kernels_changes_nothing_on_cpu():
    """bfloat16 calls trace every platform's kernel; gradients, vmap and loops must go through."""
    q, k, v, _, cache = attention_case(np.random.default_rng(0), 1, 4, 70, 2, 2, 64, "full")
    ranges = jnp.array([[[0, 70]]])

    def total(q, implementation):
        out = window_attention(
            q, k, v, cache=cache, cache_ranges=ranges, implementation=implementation
        )
        return out.astype(jnp.float32).sum()

    for f in (total, jax.grad(total)):
        f = jax.jit(f, static_argnums=1)
        got, expected = f(q, None), f(q, "xla")
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))
    looped = jax.lax.map(lambda q: total(q, None), jnp.stack([q, q]))
    np.testing.assert_allclose(looped, total(q, "xla"), rtol=1e-6)


def test_naming_the_kernel_where_there_is_no_gpu_says_why():
    q = jnp.zeros((1, 4, 2, 64), BF16)
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        window_attention(q, q, q, implementation="gpu")


@pytest.mark.gpu
def test_parity_on_a_device():
    if jax.default_backend() != "gpu" or hopper.refusal():
        pytest.skip("needs a Hopper GPU")
    for name in ("llada_8b block", "dream_7b block", "llama3_8b token", "llama3_8b tree"):
        shape = ATTENTION[name]
        B, T, S = shape.B, shape.T, shape.S
        q, k, v, mask, cache = attention_case(
            np.random.default_rng(0), B, T, S, shape.N, shape.K, shape.H, shape.mask
        )
        ranges = jnp.tile(jnp.array([[[0, S // 3], [S // 2, S - 5]]]), (B, 1, 1))
        got = window_attention(
            q, k, v, mask=mask, cache=cache, cache_ranges=ranges, layer=1, implementation="gpu"
        )
        exact = expected_attention(q, k, v, mask, None, cache, ranges)
        np.testing.assert_allclose(np.asarray(got, np.float32), exact, atol=2e-2, err_msg=name)
