"""Measures without a memory, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from decode.diffusion.components import Margin, NegEntropy, Probability, Random
from tests.lib.rounds import make_round


@jax.jit
def measured(measure, round):
    return measure.measure(round, ())[0].confidence


def test_on_the_log_scale():
    """Of two tokens of probability p and 1 - p, the first being proposed or not."""
    round = make_round([[0.9, 0.7, 0.55]], entropy=[[0.3, 0.6, 1.2]])
    told = lambda measure, round: np.exp(measured(measure, round))[0]
    np.testing.assert_allclose(told(Margin(), round), [0.8, 0.4, 0.1], rtol=1e-5)
    np.testing.assert_allclose(measured(NegEntropy(), round)[0], [-0.3, -0.6, -1.2])
    sampled = round.replace(log_prob=jnp.log(jnp.array([[0.1, 0.7, 0.45]])))
    np.testing.assert_allclose(told(Probability(), sampled), [0.1, 0.7, 0.45], rtol=1e-5)


def test_a_random_order_is_drawn_anew_and_uniform():
    round = make_round(np.full((2, 500), 0.5))
    keys = jnp.arange(2000, dtype=jnp.uint32).reshape(2, 500, 2)
    drawn = np.exp(measured(Random(), round.replace(noise_key=keys)))
    assert len(np.unique(drawn)) == 1000 and drawn.min() > 0 and drawn.max() < 1
    assert (np.histogram(drawn, bins=4, range=(0, 1))[0] > 200).all()
