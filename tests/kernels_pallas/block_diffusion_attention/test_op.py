import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from kernels_pallas.block_diffusion_attention import block_diffusion_attention as in_operations
from kernels_pallas.block_diffusion_attention import (
    block_diffusion_attention_reference,
    block_diffusion_mask,
    xla,
)
from kernels_pallas.block_diffusion_attention.tpu import attend_tpu
from kernels_pallas.window_attention import window_attention
from tests.lib.jitted import as_one_program
from tests.lib.tiers import more

block_diffusion_attention = as_one_program(in_operations)


def case(B=2, L=12, N=4, K=2, H=8, seed=0, num_noisy=1):
    rng, T = np.random.default_rng(seed), (num_noisy + 1) * L
    make = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32)
    segments = jnp.asarray(np.repeat(np.arange(3), L // 3)[None] * np.ones((B, 1)), jnp.int32)
    return make(N), make(K), make(K), segments


def test_mask_by_hand():
    """Two blocks of two: noisy sees its own noisy block and earlier clean blocks."""
    expected = [
        "11000000", "11000000", "00111100", "00111100",
        "00001100", "00001100", "00001111", "00001111",
    ]  # fmt: skip
    got = ["".join("01"[int(x)] for x in row) for row in block_diffusion_mask(4, 2)]
    assert got == expected


def test_mask_of_two_noisy_copies_and_a_causal_one_by_hand():
    """Each noisy copy sees itself; the clean one is read from left to right."""
    expected = [
        "110000000000", "110000000000", "001100001100", "001100001100",
        "000011000000", "000011000000", "000000111100", "000000111100",
        "000000001000", "000000001100", "000000001110", "000000001111",
    ]  # fmt: skip
    mask = block_diffusion_mask(4, 2, context_len=1, num_noisy=2)
    assert ["".join("01"[int(x)] for x in row) for row in mask] == expected


@pytest.mark.parametrize(("num_noisy", "context_len"), [(2, 1), *more((1, 1), (3, 6))])
def test_chunks_of_several_copies_equal_the_dense_mask(monkeypatch, num_noisy, context_len):
    monkeypatch.setattr(xla, "CHUNK", 5)
    q, k, v, segments = case(num_noisy=num_noisy)
    options = dict(block_len=2, context_len=context_len, segment_ids=segments)
    got = block_diffusion_attention(q, k, v, **options)
    expected = block_diffusion_attention(q, k, v, implementation="reference", **options)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("block_len", [1, 2, 4, 12])
@pytest.mark.parametrize("with_segments", [False, True])
def test_chunks_equal_the_dense_mask(monkeypatch, block_len, with_segments):
    monkeypatch.setattr(xla, "CHUNK", 5)  # several chunks, the last one shorter
    q, k, v, segments = case()
    options = dict(block_len=block_len, segment_ids=segments if with_segments else None)
    got = block_diffusion_attention(q, k, v, **options)
    expected = block_diffusion_attention(q, k, v, implementation="reference", **options)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.exhaustive(every=4)
def test_denoising_a_block_sees_what_decoding_it_with_a_cache_sees():
    """Noisy block b of the long pass = a window over the clean prefix's keys, bidirectional."""
    q, k, v, _ = case(B=1)
    whole = block_diffusion_attention(q, k, v, block_len=4)
    for first in (0, 4, 8):
        block = slice(first, first + 4)
        cache = tuple(x[:, 12:].swapaxes(1, 2)[None] for x in (k, v))
        alone = window_attention(
            q[:, block], k[:, block], v[:, block],
            cache=cache, cache_ranges=jnp.array([[[0, first]]]),
        )  # fmt: skip
        np.testing.assert_allclose(whole[:, block], alone, atol=1e-5)


def test_gradients_match_finite_differences(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 4)
    q, k, v, segments = case(B=1, L=6, N=2, K=1, H=4)
    run = functools.partial(block_diffusion_attention, block_len=2, segment_ids=segments)
    loss = lambda q, k, v: (run(q, k, v) ** 2).sum()
    check_grads(loss, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(("num_noisy", "context_len"), [(1, None), *more((2, 1))])
def test_splash_attention_equals_the_reference_forward_and_backward(num_noisy, context_len):
    q, k, v, _ = case(B=1, L=128, N=2, K=1, H=64, num_noisy=num_noisy)
    segments = jnp.asarray(np.arange(128)[None] // 64, jnp.int32)
    blocks = dict(block_len=16, context_len=context_len)
    splash = functools.partial(attend_tpu, interpret=True, **blocks)
    dense = functools.partial(block_diffusion_attention_reference, **blocks)

    def loss(attend, q, k, v):
        return (attend(q, k, v, segments) ** 2).sum()

    np.testing.assert_allclose(splash(q, k, v, segments), dense(q, k, v, segments), atol=1e-5)
    got = jax.grad(functools.partial(loss, splash), argnums=(0, 1, 2))(q, k, v)
    expected = jax.grad(functools.partial(loss, dense), argnums=(0, 1, 2))(q, k, v)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


def test_scores_of_the_whole_sequence_are_never_stored(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK", 64)
    q, k, v, _ = case(B=1, L=1536, N=1, K=1, H=8)
    grad = jax.jit(jax.grad(lambda q: block_diffusion_attention(q, k, v, block_len=32).sum()))
    memory = grad.lower(q).compile().memory_analysis()
    assert memory.temp_size_in_bytes < (2 * 1536) ** 2 * 4 / 4


def test_bad_arguments_are_refused():
    q, k, v, segments = case()
    with pytest.raises(ValueError, match="block_len=5 must divide L"):
        block_diffusion_attention(q, k, v, block_len=5)
    with pytest.raises(ValueError, match="must both be"):
        block_diffusion_attention(q, k[:, :3], v, block_len=2)
    with pytest.raises(ValueError, match="context_len=0 must be at least 1"):
        block_diffusion_attention(q, k, v, block_len=2, context_len=0)
    with pytest.raises(ValueError, match="two copies of L or more"):
        block_diffusion_attention(
            q[:, :12], k[:, :12], v[:, :12], block_len=2, segment_ids=segments
        )
    with pytest.raises(ValueError, match="segment_ids"):
        block_diffusion_attention(q, k, v, block_len=2, segment_ids=segments[:1])
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        block_diffusion_attention(q, k, v, block_len=2, implementation="tpu")
    with pytest.raises(NotImplementedError, match="'xla', 'tpu' or 'reference'"):
        block_diffusion_attention(q, k, v, block_len=2, implementation="metal")
