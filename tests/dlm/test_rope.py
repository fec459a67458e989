"""Rotary frequencies of every kind, by hand in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import rope
from dlm.blocks.rotary import rotary_angles, rotate
from dlm.presets import PRESETS

R, THETA = 16, 1000.0
F = THETA ** (-np.arange(0, R, 2) / R)
LONG = rope.LongRope(
    short=tuple(1 + i / 8 for i in range(8)), long=tuple(2.0 + i for i in range(8)),
    original_max_seq_len=32, attention=1.2,
)  # fmt: skip


def yarn(scaling):
    """Which index turns `beta` times within the original length, and a ramp between two of them."""
    index = lambda beta: (
        R * np.log(scaling.original_max_seq_len / (2 * np.pi * beta)) / (2 * np.log(THETA))
    )
    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = np.floor(low), np.ceil(high)
    share = np.clip((np.arange(R // 2) - max(low, 0)) / (min(high, R - 1) - max(low, 0)), 0, 1)
    assert 0 < ((share > 0) & (share < 1)).sum() < R // 2  # of all three kinds
    return F / scaling.factor * share + F * (1 - share)


def dynamic(n, m=32, factor=2.0):
    base = THETA * (factor * max(n, m) / m - (factor - 1)) ** (R / (R - 2))
    return base ** (-np.arange(0, R, 2) / R)


YARN = rope.Yarn(factor=8.0, original_max_seq_len=64, beta_fast=4.0, attention=1.3)
KINDS = {
    "none": (None, F, F),
    "linear": (rope.Linear(factor=4.0), F / 4, F / 4),
    "yarn": (YARN, yarn(YARN), yarn(YARN)),
    "yarn, not rounded": (
        dataclasses.replace(YARN, is_truncated=False),
        *(yarn(dataclasses.replace(YARN, is_truncated=False)),) * 2,
    ),
    "dynamic": (rope.Dynamic(factor=2.0, original_max_seq_len=32), F, dynamic(50)),
    "longrope": (LONG, F / np.array(LONG.short), F / np.array(LONG.long)),
}


@pytest.mark.parametrize("name", KINDS)
def test_frequencies(name):
    """Of a row that stays short, 20 positions, and of one of 50, which is long."""
    scaling, short, long = KINDS[name]
    cfg = dataclasses.replace(PRESETS["tiny"], rope_theta=THETA, rope_scaling=scaling)
    positions = np.array([[0, 1, 7], [0, 1, 7]], np.int32)
    angles = jax.jit(lambda x: rotary_angles(x, cfg, length=jnp.array([20, 50])))(positions)
    factor = 1.0 if scaling is None else scaling.attention_factor
    expected = positions[..., None] * np.stack([short, long])[:, None]
    np.testing.assert_allclose(angles.cos[:, :, 0], factor * np.cos(expected), atol=1e-5)
    np.testing.assert_allclose(angles.sin[:, :, 0], factor * np.sin(expected), atol=1e-5)


def test_lengths_that_are_not_said_are_asked_for():
    cfg = dataclasses.replace(PRESETS["tiny"], rope_scaling=LONG)
    with pytest.raises(ValueError, match="'longrope' depend on how long a text becomes"):
        rotary_angles(jnp.zeros((1, 2), jnp.int32), cfg)


def test_a_part_of_a_head_is_rotated_half_against_half():
    cfg = dataclasses.replace(PRESETS["tiny"], rope_theta=THETA, rotary_dim=8)
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 16)).astype(np.float32)
    positions = np.array([[0, 3, 9]], np.int32)
    got = rotate(jnp.asarray(x), rotary_angles(jnp.asarray(positions), cfg))
    angle = positions[0][:, None, None] * THETA ** (-np.arange(0, 8, 2) / 8)
    first, second = x[0, ..., :4], x[0, ..., 4:8]
    np.testing.assert_allclose(
        got[0, ..., :4], first * np.cos(angle) - second * np.sin(angle), atol=1e-5
    )
    np.testing.assert_allclose(
        got[0, ..., 4:8], second * np.cos(angle) + first * np.sin(angle), atol=1e-5
    )
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])


def test_queries_grow_with_their_position():
    cfg = dataclasses.replace(PRESETS["tiny"], query_growth=(0.1, 4))
    scale = rotary_angles(jnp.array([[0, 3, 4, 11]]), cfg).query_scale[0, :, 0, 0]
    np.testing.assert_allclose(scale, 1 + 0.1 * np.log([1, 1, 2, 3]), rtol=1e-6)
    base = dataclasses.replace(PRESETS["tiny"], local_rope_theta=50.0, rope_scaling=YARN)
    local = rotary_angles(jnp.array([[1]]), base, is_local=True)
    np.testing.assert_allclose(
        local.sin[0, 0, 0], np.sin(50.0 ** (-np.arange(0, R, 2) / R)), atol=1e-6
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rope.Linear(factor=0), "'linear': factor=0 must be positive"),
        (lambda: dataclasses.replace(YARN, beta_fast=1.0), "beta_fast=1.0 must be above beta_slow"),
        (lambda: dataclasses.replace(LONG, long=(0.0,) * 8), "long=.* must be positive"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
