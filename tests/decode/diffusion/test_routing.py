"""S2D2's routing, against what the public code says of given logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.routing import Routing
from tests.lib.paths import GOLDEN

FOLDER = GOLDEN / "s2d2_routing"
CASES = json.loads((FOLDER / "s2d2_routing.json").read_text())["cases"]


@jax.jit
def route(routing, undecided, logits, judged):
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    return routing.route(
        undecided, -(p * log_p).sum(axis=-1), p.max(axis=-1), logits.shape[-1], judged
    )


def routing_of(case):
    return Routing(
        policy=case["policy"],
        is_dynamic=case["score_type"] == "difference_dynamic",
        **{name: case[name] for name in ("penalty", "threshold", "on", "off", "min_span")},
        sure=case["confidence_threshold"],
    )


@pytest.mark.parametrize("case", CASES, ids=[f"{c['policy']}-{c['seed']}" for c in CASES])
def test_golden_routes(case):
    arrays = np.load(FOLDER / "s2d2_routing.npz")
    routing, judged = routing_of(case), jnp.zeros(1, bool)
    for step, logits in zip(case["steps"], arrays[case["logits"]], strict=True):
        undecided = jnp.asarray(step["masked"], bool)[None]
        found = route(routing, undecided, jnp.asarray(logits)[None], judged)
        judged = found.judges
        assert np.flatnonzero(found.span[0]).tolist() == step["span"]
        np.testing.assert_allclose(found.gain[0], step["expected_accepted"], rtol=1e-5)
        assert bool(judged[0]) == step["verify"]


def test_the_gain_is_what_is_accepted_on_average():
    """Card: against a simulation with known probabilities."""
    alpha = np.array([0.9, 0.5, 0.7, 0.8])
    entropy = jnp.asarray(-np.log(alpha) * np.log(50))[None]
    undecided = jnp.array([[False, True, True, True]])
    found = Routing().route(undecided, entropy, jnp.ones((1, 4)), 50, jnp.zeros(1, bool))
    coins = np.random.default_rng(0).random((20_000, 3)) < alpha[1:]
    accepted = np.cumprod(coins, axis=1).sum(axis=1)
    error = accepted.std() / np.sqrt(len(accepted))
    assert abs(found.gain[0] - accepted.mean()) < 3 * error


def test_without_a_cost_every_block_is_judged():
    """Card: c = 0, tau = 0; a block of which nothing is undecided has nothing to gain."""
    entropy, p = jnp.full((2, 3), 2.0), jnp.full((2, 3), 0.99)
    undecided = jnp.array([[True, False, True], [False, False, True]])
    found = Routing(penalty=0.0).route(undecided, entropy, p, 50, jnp.zeros(2, bool))
    assert found.judges.tolist() == [True, True]
    assert found.span.tolist() == [[True, False, False], [False, False, True]]
