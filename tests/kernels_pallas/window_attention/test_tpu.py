"""The TPU kernel in the interpreter, which also looks for races and stray reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.window_attention import (
    Near,
    op,
    tpu,
    window_attention,
    window_attention_reference,
)
from kernels_pallas.window_attention.xla import attend_xla
from tests.lib.jitted import as_one_program
from tests.lib.kernels import INTERPRET
from tests.lib.tiers import more


def attention_case(B, T, S, N, K, H, mask, dtype=jnp.float32, seed=0):
    """Operands, and a batch whose rows see two ranges, a part, or nothing of the cache.

    Of odd batches it has a row more than the window.
    """
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    if mask == "tree":
        words = rng.integers(0, 2**32, size=(B, T, -(-T // 32)), dtype=np.uint32)
        mask = jnp.asarray(words)
    windows = [[0, T], [min(1, T - 1), T], [0, 0]]
    ranges = [[[0, S // 2], [S * 3 // 4, S]], [[S // 3, S // 3 + 1], [0, 0]], [[0, 0], [5, 5]]]
    window_range = jnp.array([windows[b % 3] for b in range(B)])
    cache_ranges = jnp.array([ranges[b % 3] for b in range(B)])
    cache = (make(2, B + B % 2, K, S, H), make(2, B + B % 2, K, S, H)) if S else None
    q, k, v = make(B, T, N, H), make(B, T, K, H), make(B, T, K, H)
    return q, k, v, mask, window_range, cache, cache_ranges if S else None, 1


attend = as_one_program(functools.partial(tpu.window_attention_tpu, interpret=INTERPRET))
reference = as_one_program(window_attention_reference)

CASES = [
    dict(B=3, T=5, S=300, N=8, K=2, H=64, mask="full"),  # ragged cache tile, group of 4
    dict(B=2, T=37, S=700, N=7, K=1, H=128, mask="tree"),  # two mask words, group of 7
    dict(B=3, T=1, S=130, N=4, K=4, H=64, mask="causal"),  # one token
    dict(B=1, T=600, S=40, N=2, K=1, H=64, mask="causal"),  # several row and window tiles
    dict(B=2, T=20, S=0, N=8, K=1, H=128, mask="full"),  # no cache
]


name_of = lambda case: str(tuple(case.values()))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_window_attention_equals_the_reference(case):
    operands = attention_case(**case)
    got = attend(*operands)
    np.testing.assert_allclose(got, reference(*operands), atol=1e-5, rtol=1e-5)


def test_window_attention_in_bfloat16():
    operands = attention_case(2, 16, 200, 4, 2, 64, "full", jnp.bfloat16)
    got = attend(*operands)
    assert got.dtype == jnp.bfloat16
    exact = lambda x: x.astype(jnp.float32) if getattr(x, "dtype", None) == jnp.bfloat16 else x
    expected = reference(*jax.tree.map(exact, operands))
    # Weights and outputs are each rounded to 8 bits: 2 roundings of 2^-9 of |v| up to 4.
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.exhaustive(every=4)
@settings(max_examples=3)
@given(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]),
    st.sampled_from(["full", "causal", "tree"]), st.integers(0, 99),
)  # fmt: skip
def test_window_attention_of_any_shape(T, S, K, group, mask, seed):
    operands = attention_case(2, T, S, K * group, K, 64, mask, seed=seed)
    got = attend(*operands)
    np.testing.assert_allclose(got, reference(*operands), atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("case", [*CASES[:2], *more(*CASES[2:4])], ids=name_of)
def test_limited_sight_scale_and_cap(case):
    """Text in order in the first row; in the others keys stand anywhere."""
    q, k, v, mask, window, cache, ranges, layer = attention_case(**case)
    B, T, S = case["B"], case["T"], case["S"]
    rng = np.random.default_rng(1)
    cached = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    cached[0] = np.arange(S)
    positions = S + np.tile(np.arange(T, dtype=np.int32), (B, 1))
    positions[1:] -= S // 2
    near = Near(np.int32(S // 3), positions, cached)
    options = dict(scale=0.3, cap=2.0)

    def run(attend, near):
        fixed = lambda near: attend(q, k, v, mask, window, cache, ranges, layer, near, **options)
        return jax.jit(fixed)(near)

    expected = run(window_attention_reference, near)
    got = run(functools.partial(tpu.window_attention_tpu, interpret=INTERPRET), near)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)
    assert (expected != run(window_attention_reference, None)).any()


def test_cache_tiles_out_of_sight_are_not_read():
    q, k, v, mask, window, cache, _, layer = attention_case(1, 4, 1600, 2, 1, 64, "full")
    ranges = jnp.array([[[0, 1600]]])
    near = Near(jnp.int32(100), 1600 + jnp.arange(4)[None], jnp.arange(1600)[None])
    _, count = tpu.needed_tiles(ranges, 4, 512, near.of_any())
    assert count.tolist() == [2]  # of 1501 to 1599: slots 1024 to 1535, and the rest
    expected = jax.jit(window_attention_reference, static_argnums=3)(
        q, k, v, mask, window, cache, ranges, layer, near
    )
    spoiled = tuple(c.at[..., :1024, :].set(jnp.nan) for c in cache)
    run = jax.jit(
        functools.partial(tpu.window_attention_tpu, interpret=INTERPRET), static_argnums=3
    )
    got = run(q, k, v, mask, window, spoiled, ranges, layer, near)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_only_needed_cache_tiles_are_read():
    """Tiles no range touches may hold anything; so may masked slots, as keys and as values."""
    q, k, v, mask, window, cache, _, layer = attention_case(1, 4, 1600, 2, 1, 64, "full")
    ranges = jnp.array([[[10, 20], [1300, 1400]]])
    order, count = tpu.needed_tiles(ranges, 4, 512)
    assert order.tolist() == [[0, 2, 2, 2]] and count.tolist() == [2]
    expected = reference(q, k, v, mask, window, cache, ranges, layer)
    spoiled = tuple(c.at[..., 512:1024, :].set(jnp.nan) for c in cache)
    got = attend(q, k, v, mask, window, spoiled, ranges, layer)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.exhaustive(every=4)
def test_gradient_is_that_of_the_xla_implementation():
    q, k, v, mask, window, cache, ranges, layer = attention_case(2, 6, 40, 4, 2, 64, "causal")
    kernel = lambda *args: tpu.window_attention_tpu(*args, interpret=INTERPRET)

    def loss(q, k, v, cache, attend):
        return (attend(q, k, v, mask, window, cache, ranges, layer) ** 2).sum()

    wrapped = lambda *args: op._with_xla_gradient(kernel, *args)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)), static_argnums=4)
    got = gradient(q, k, v, cache, wrapped)
    expected = gradient(q, k, v, cache, window_attention_reference)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("mask", ["full", "causal", "tree"])
def test_gradient_of_a_window_alone(mask, monkeypatch):
    """It is computed a few heads at a time: five of six here, then the sixth."""
    monkeypatch.setattr(op, "BACKWARD_SCORES", 5 * 2 * 40 * 40)
    q, k, v, mask, window, *_ = attention_case(3, 40, 0, 4, 2, 64, mask)

    def loss(q, k, v, attend):
        return (attend(q, k, v, mask, window, None, None, 0) ** 2).sum()

    wrapped = lambda *args: op._with_xla_gradient(attend_xla, *args)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    got, expected = gradient(q, k, v, wrapped), gradient(q, k, v, window_attention_reference)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_the_named_kernel_says_why_it_cannot_run():
    q = jnp.zeros((1, 4, 2, 64))
    with pytest.raises(NotImplementedError, match="needs a TPU and the default backend is cpu"):
        window_attention(q, q, q, implementation="tpu")
    assert "head width 24" in tpu.refusal(jnp.zeros((1, 4, 2, 24)), "full")
    bits = jnp.zeros((1, 600, 19), jnp.uint32)
    assert "600 window positions" in tpu.refusal(jnp.zeros((1, 600, 1, 64)), bits)


@pytest.mark.parametrize("T", [1, 32, 64, 256])
@pytest.mark.parametrize(("N", "K"), [(32, 32), (28, 4), (32, 8)])
def test_tiles_of_real_models_fit(T, N, K):
    tiles = tpu.plan(T, 8192, N, K, 128, 2)
    assert tiles.vmem_bytes <= tpu.VMEM_BUDGET and K % tiles.heads == 0
