"""Hidden states, vocabularies, and what is said of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np


def random_case(M=7, D=16, V=300, dtype=jnp.float32, seed=0):
    """Hidden states [M, D] and a head [V, D]."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(M, D)), dtype)
    head = jnp.asarray(rng.normal(size=(V, D)) * 3 / np.sqrt(D), dtype)
    return hidden, head


def assert_same(got, expected, atol=2e-5):
    """Every field of the statistics."""
    for field in dataclasses.fields(expected):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        if b is not None:
            np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5, err_msg=field.name)
