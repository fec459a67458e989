import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.sampling import Sampling
from decode.diffusion.components import Filters
from tests.lib.rounds import make_round

V = 9


@jax.jit
def both(filters, round, logits, occurred, sampling):
    """What is left after the filters, and what autoregressive sampling draws from."""
    z = filters.mask_logits(round, logits, ())
    temperature = 1.0 if round.temperature is None else round.temperature
    expected = sampling.replace(temperature=temperature).probs(logits, occurred[:, None])
    return jax.nn.softmax(z / temperature), expected


@pytest.mark.parametrize("temperature", [None, 0.6])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(None, top_k=3, repetition_penalty=1.7),
        Sampling(None, top_p=0.7, logit_bias=jnp.linspace(-1, 1, V)),
        Sampling(None, min_p=0.3),
    ],
    ids=["top-k, penalty", "top-p, bias", "min-p"],
)
def test_they_are_those_of_autoregressive_sampling(sampling, temperature):
    logits = jax.random.normal(jax.random.key(0), (2, 3, V)) * 2
    occurred = jnp.arange(2 * V).reshape(2, V) % 3 == 0
    round = make_round([[0.5] * 3] * 2).replace(temperature=temperature, occurred=occurred)
    left, expected = both(Filters(sampling), round, logits, occurred, sampling)
    np.testing.assert_allclose(left, expected, atol=1e-6)
    assert (np.asarray(left) == 0).any()


def test_who_counts_repetitions_asks_for_what_occurred(toy_cfg):
    assert Filters(Sampling(None, top_k=3)).needs == {"logits"}
    assert Filters(Sampling(None, repetition_penalty=2.0)).needs == {"logits", "occurred"}
    with pytest.raises(ValueError, match=r"top_k=99 must be in \[1, vocab_size=24\]"):
        Filters(Sampling(None, top_k=99)).validate(toy_cfg)
