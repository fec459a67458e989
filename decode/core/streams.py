"""Random streams: one per row, from which rounds, positions and components draw on their own.

A row's key is two words that follow from its seed. Nothing that is drawn from it depends on what
else is in the batch, nor on `jax_default_prng_impl`: everything here is Threefry.

Letters: B rows; `...` any leading axes.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp

from kernels_pallas.unembed_stats import threefry2x32


class Stream(enum.IntEnum):
    """What a stream is for.

    The first are counters under which components of the diffusion loop draw from a position's
    `noise_key`: proposals use vocabulary ids as counters, so they come down from 2^32 - 1. The
    others are folded into a row's key: what `round_key` gives is split into DRAFT, TARGET and
    ACCEPT, and the last of these into TEST and BONUS.
    """

    RANDOM = 0xFFFFFFFF
    DREAM_QUOTA = 0xFFFFFFFE
    ORIGIN = 0xFFFFFFFD
    REMDM = 0xFFFFFFFC
    NOISE = 0xFFFFFFFB

    DRAFT = 0
    TARGET = 1
    ACCEPT = 2
    TEST = 0  # of another key
    BONUS = 1
    FILLER = 20
    NEXT = 21


def wrap(key: jax.Array) -> jax.Array:
    """A key of `jax.random` from two words [2] uint32."""
    return jax.random.wrap_key_data(key, impl="threefry2x32")


def uniforms(key: jax.Array, num: int) -> jax.Array:
    """[B, num] float32 in [0, 1), from a random stream [B, 2] uint32 per row."""
    one = lambda key: jax.random.uniform(wrap(key), (num,))  # noqa: E731
    return jax.vmap(one)(key)


def fold_in(key: jax.Array, data: jax.Array | int) -> jax.Array:
    """A further random stream [B, 2] uint32 per row; `data` is a number, or one per row."""

    def one(key: jax.Array, data: jax.Array) -> jax.Array:
        return jax.random.key_data(jax.random.fold_in(wrap(key), data))

    return jax.vmap(one)(key, jnp.broadcast_to(jnp.asarray(data, jnp.uint32), key.shape[:1]))


def draw_bits(noise_key: jax.Array, stream: Stream) -> jax.Array:
    """Random words [...] uint32 of keys [..., 2] uint32."""
    key, counter = noise_key, jnp.uint32(stream)
    return threefry2x32(key[..., 0], key[..., 1], counter, jnp.uint32(0))[0]


def draw_uniform(noise_key: jax.Array, stream: Stream) -> jax.Array:
    """Uniform numbers [...] float32 in (0, 1) of keys [..., 2] uint32."""
    return ((draw_bits(noise_key, stream) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
