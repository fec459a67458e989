"""The TPU kernel in the interpreter, which also looks for races and stray reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.unembed_stats import Noise, tpu, unembed_stats, unembed_stats_reference
from kernels_pallas.unembed_stats.summary import finish
from tests.lib.kernels import INTERPRET
from tests.lib.vocabulary import assert_same, random_case

summarize = jax.jit(
    functools.partial(tpu.summarize_tpu, interpret=INTERPRET),
    static_argnums=2,
    static_argnames=("k", "cap"),
)
reference = jax.jit(unembed_stats_reference, static_argnums=(4, 6))


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(("M", "D", "V"), [(7, 64, 1000), (270, 32, 300), (5, 96, 4173)])
def test_vocabulary_statistics_equal_the_reference(M, D, V):
    hidden, head = random_case(M, D, V)
    banned = jnp.array([3, V - 1, -1])
    expected = reference(hidden, head, banned)
    summary = summarize(hidden, head, 0, banned, None, None, k=0)
    assert_same(finish(summary), expected)


def test_capped_logits():
    hidden, head = random_case(7, 64, 1000)
    expected = reference(hidden, head, None, None, 0, None, 3.0)
    summary = summarize(hidden, head, 0, None, None, None, k=0, cap=3.0)
    assert_same(finish(summary), expected)


@pytest.mark.exhaustive(every=4)
def test_samples_tops_and_given_ids():
    M, V = 9, 4500  # three vocabulary tiles, the last one ragged
    hidden, head = random_case(M, 32, V)
    key = jax.random.bits(jax.random.key(1), (M, 2), jnp.uint32)
    noise = Noise(key, jnp.float32(0.7))
    given_ids = jnp.tile(jnp.array([[0, 2100, V - 1]]), (M, 1))
    banned = jnp.array([3, V - 1])
    expected = reference(hidden, head, banned, noise, 6, given_ids)
    summary = summarize(hidden, head, 0, banned, noise, given_ids, k=6)
    assert_same(finish(summary), expected)


def test_ties_go_to_the_lowest_id():
    hidden = jnp.ones((2, 8))
    head = jnp.zeros((5000, 8)).at[jnp.array([9, 40, 4000])].set(1.0)
    summary = summarize(hidden, head, 100, None, None, None, k=3)
    stats = finish(summary)
    np.testing.assert_array_equal(stats.token, 109)
    np.testing.assert_array_equal(stats.top_tokens, [[109, 140, 4100]] * 2)


def test_vocabulary_in_bfloat16():
    hidden, head = random_case(16, 128, 700, jnp.bfloat16)
    expected = reference(hidden, head)
    summary = summarize(hidden, head, 0, None, None, None, k=0)
    # Products of 8-bit numbers are exact in float32, so only the order of sums differs.
    assert_same(finish(summary), expected, atol=1e-4)


def test_the_named_kernel_says_why_it_cannot_run():
    with pytest.raises(NotImplementedError, match="needs a TPU and the default backend is cpu"):
        unembed_stats(jnp.zeros((2, 8)), jnp.zeros((9, 8)), implementation="tpu")
    assert "k=200" in tpu.refusal(jnp.zeros((9, 8)), 200, None)


@pytest.mark.parametrize("T", [1, 32, 64, 256])
def test_tiles_of_real_models_fit(T):
    for D, V in ((4096, 126464), (3584, 152064), (8192, 200_000)):
        tiles = tpu.plan(T, D, V, 2)
        assert tiles.vmem_bytes <= tpu.VMEM_BUDGET
