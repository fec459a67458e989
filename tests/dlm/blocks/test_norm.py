"""Norms and MLPs by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import scipy.special

from dlm.blocks.mlp import mlp
from dlm.blocks.norm import norm
from dlm.presets import PRESETS

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 8)).astype(np.float32)
W, B = (RNG.normal(size=8).astype(np.float32) for _ in range(2))


def test_kinds_of_norms():
    rms = X / np.sqrt((X**2).mean(axis=-1, keepdims=True) + 1e-3)
    centred = X - X.mean(axis=-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3)
    p = {"n": jnp.asarray(W), "n_bias": jnp.asarray(B)}
    for kind, expected in (
        ("rms", rms * W), ("rms_offset", rms * (1 + W)), ("layer", layer * W + B),
    ):  # fmt: skip
        cfg = dataclasses.replace(PRESETS["tiny"], norm=kind, norm_eps=1e-3)
        np.testing.assert_allclose(norm(jnp.asarray(X), p, "n", cfg), expected, atol=1e-5)


def test_an_offset_is_added_before_anything_is_rounded():
    """1 + w in float32: in bfloat16 a small w would be lost."""
    cfg = dataclasses.replace(PRESETS["tiny"], norm="rms_offset", dtype="bfloat16")
    x = jnp.ones((1, 1, 4), jnp.bfloat16)
    p = {"n": jnp.full(4, 2.0**-7, jnp.bfloat16)}
    np.testing.assert_array_equal(norm(x, p, "n", cfg).astype(np.float32), 1 + 2.0**-7)


def test_kinds_of_mlps():
    draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
    p = {"gate": draw(8, 5), "up": draw(8, 5), "down": draw(5, 8)}
    biases = {"gate_bias": draw(5), "up_bias": draw(5), "down_bias": draw(8)}
    acts = {
        "silu": lambda x: x * scipy.special.expit(x),
        "gelu": lambda x: x * scipy.special.ndtr(x),
        "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }
    for name, act in acts.items():
        gated = (act(X @ p["gate"]) * (X @ p["up"])) @ p["down"]
        plain = act(X @ p["up"] + biases["up_bias"]) @ p["down"] + biases["down_bias"]
        without = {k: jnp.asarray(v) for k, v in (p | biases).items() if not k.startswith("gate")}
        given = {k: jnp.asarray(v) for k, v in p.items()}
        np.testing.assert_allclose(mlp(jnp.asarray(X), given, name), gated, atol=1e-4)
        np.testing.assert_allclose(mlp(jnp.asarray(X), without, name), plain, atol=1e-4)
