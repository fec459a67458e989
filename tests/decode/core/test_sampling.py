"""The filters by hand, one number after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling, draw
from decode.core.streams import fold_in, uniforms

RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(0, 2, (40, 12)), jnp.float32)


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(z, seen, temperature, top_k, top_p, min_p, penalty):
    """One row, in float64, filter after filter as Hugging Face's `generate` has them."""
    z = np.array(z, np.float64)
    if penalty is not None:
        z[seen] = np.where(z[seen] > 0, z[seen] / penalty, z[seen] * penalty)
    z = z / temperature
    if top_k is not None:
        z[z < np.sort(z)[-top_k]] = -np.inf
    if top_p is not None:
        total = 0.0
        keep = np.zeros(len(z), bool)
        for i in np.argsort(-z, kind="stable"):
            if total >= top_p:
                break
            keep[i] = True
            total += softmax(z)[i]
        z[~keep] = -np.inf
    p = softmax(z)
    if min_p is not None:
        p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "numbers",
    [
        (1.0, None, None, None, None),
        (0.7, 4, None, None, None),
        (1.3, None, 0.8, None, None),
        (1.0, None, None, 0.2, None),
        (1.0, None, None, None, 1.5),
        (0.8, 6, 0.9, 0.05, 0.7),
        (1.0, 1, None, None, None),
        (1.0, None, 1.0, 0.0, None),
    ],
)
@pytest.mark.parametrize("digits", [None, 0])
def test_laws_by_hand(numbers, digits):
    """Rounded logits have ties, of which top-p keeps the first ones."""
    logits = Z if digits is None else jnp.round(Z, digits)
    seen = RNG.random((40, 12)) < 0.4
    law = Sampling(*numbers).probs(logits, jnp.asarray(seen))
    expected = [by_hand(z, s, *numbers) for z, s in zip(logits, seen, strict=True)]
    np.testing.assert_allclose(law, expected, atol=1e-6)


def test_no_temperature_is_the_arg_max_after_the_penalty():
    seen = jnp.zeros_like(Z, bool).at[:, 3].set(True)
    law = Sampling(None, repetition_penalty=1e6).probs(Z.at[:, 3].set(50.0), seen)
    expected = np.where(np.arange(12) == 3, 50 / 1e6, Z).argmax(-1)
    np.testing.assert_array_equal(np.argmax(law, axis=-1), expected)
    assert np.asarray(law).max(-1).tolist() == [1.0] * 40


def test_draws_follow_the_law_and_rows_their_own_streams():
    law = Sampling(1.0).probs(Z[:1])[0]
    key = jax.random.key_data(jax.random.split(jax.random.key(1), 50_000))
    counts = np.bincount(draw(key, jnp.broadcast_to(law, (50_000, 12))), minlength=12)
    expected = np.asarray(law) * 50_000
    assert ((counts - expected) ** 2 / expected).sum() < 40  # 11 degrees of freedom
    np.testing.assert_array_equal(
        draw(key[7:8], law[None])[0], draw(key, jnp.tile(law, (50_000, 1)))[7]
    )
    assert (uniforms(key[:4], 3) == uniforms(key, 3)[:4]).all()
    assert (fold_in(key, 1) != fold_in(key, 2)).any()
    assert (fold_in(key, jnp.arange(50_000))[5] == fold_in(key[5:6], 5)[0]).all()
