"""Caches whose slots are split over devices: read, written and attended to as if whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dlm.sharding import make_mesh
from kernels_pallas.slots import put_slots, take_slots
from kernels_pallas.window_attention import window_attention, window_attention_reference

S = 32  # slots, 8 on each of 4 devices
needs_devices = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs 4 (fake) devices")


def split(function, in_specs, out_specs):
    """`function`, run by 4 devices that share an axis "sequence"."""
    run = functools.partial(function, "sequence")
    mesh = make_mesh(sequence=4)
    shard = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(shard)


def randoms(*shapes):
    keys = jax.random.split(jax.random.key(sum(map(sum, shapes))), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.exhaustive(every=4)
@needs_devices
@pytest.mark.parametrize("T", [1, 3, 8, 11, 32])
def test_written_anywhere(T):
    old, new = randoms((2, S, 3), (2, T, 3))
    put = split(
        lambda axis, old, new, at: put_slots(old, new, at, axis),
        (P(None, "sequence"), P(), P()),
        P(None, "sequence"),
    )
    for at in range(S - T + 1):
        expected = np.array(old)
        expected[:, at : at + T] = new
        np.testing.assert_array_equal(put(old, new, jnp.int32(at)), expected)


@needs_devices
def test_read_anywhere():
    (old,) = randoms((2, S, 3))
    take = split(
        lambda axis, old, slots: take_slots(old, slots, axis), (P(None, "sequence"), P()), P()
    )
    slots = jnp.array([0, 31, 7, 8, 8, 15, 16, 30], jnp.int32)
    np.testing.assert_array_equal(take(old, slots), old[:, slots])
    np.testing.assert_array_equal(take_slots(old, slots), old[:, slots])


@pytest.mark.exhaustive(every=4)
@needs_devices
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_attention_to_slots_of_all_devices(mask):
    """Ranges within a device, over several, of none; and what lies outside of them is not seen."""
    B, T, N, K, H = 4, 3, 4, 2, 8
    q, k, v, ck, cv = randoms(
        (B, T, N, H), (B, T, K, H), (B, T, K, H), (2, B, K, S, H), (2, B, K, S, H)
    )
    ranges = np.array([[[0, 5], [6, 7]], [[3, 29], [31, 32]], [[8, 16], [0, 0]], [[0, 0], [9, 9]]])
    seen = ((np.arange(S) >= ranges[..., :1]) & (np.arange(S) < ranges[..., 1:])).any(axis=1)
    ck, cv = (jnp.where(seen[None, :, None, :, None], c, 1e9) for c in (ck, cv))
    window_range = jnp.array([[0, 3], [1, 3], [0, 2], [2, 2]])  # the last row sees nothing at all
    by_slot = P(None, None, None, "sequence")

    def attend(axis, q, k, v, cache, ranges):
        return window_attention(
            q, k, v, mask=mask, window_range=window_range, cache=cache, cache_ranges=ranges,
            layer=1, slots_axis=axis,
        )  # fmt: skip

    out = split(attend, (P(), P(), P(), by_slot, P()), P())(q, k, v, (ck, cv), ranges)
    expected = window_attention_reference(q, k, v, mask, window_range, (ck, cv), ranges, 1)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(out[3], 0)
