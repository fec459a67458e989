import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.trainable import Learned
from tests.lib.models import laws_of
from tests.lib.objectives import judge, loss_of, make_batch
from train.losses import mean_cross_entropy
from train.objectives.causal import Causal


def test_mean_by_hand():
    z = jnp.array([0.0, np.log(3.0)])
    logits = jnp.stack([jnp.stack([z, z, z])])
    loss, metrics = mean_cross_entropy(
        *judge(logits, jnp.array([[0, 1, 1]])), jnp.array([[True, True, False]])
    )
    np.testing.assert_allclose(loss, (np.log(4) + np.log(4 / 3)) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], 0.5)


@pytest.mark.parametrize("on_prompt", [False, True])
def test_loss_is_that_of_rows_alone(toy_cfg, toy_params, on_prompt):
    """Against one forward per row, without padding, over exactly the tokens that count."""
    batch = jax.device_get(make_batch(toy_cfg, rows=3))
    loss, _ = loss_of(Causal(on_prompt=on_prompt), Learned(toy_params), toy_cfg, batch)
    total, count = 0.0, 0
    for row in range(3):
        start, length = int(batch["prompt_start"][row]), int(batch["completion_len"][row])
        prompt, completion = batch["prompt"][row, start:], batch["completion"][row, :length]
        tokens = np.concatenate([prompt, completion])
        laws = laws_of(toy_params, toy_cfg, tokens)
        for i in range(1, len(tokens)):
            if on_prompt or i >= len(prompt):
                total -= np.log(laws[i - 1, tokens[i]])
                count += 1
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)


def test_tokens_after_the_end_do_not_count(toy_cfg, toy_params):
    batch = jax.device_get(make_batch(toy_cfg))
    longer = dict(batch)
    eos = np.full((4, 3), toy_cfg.eos_token_id, np.int32)
    longer["completion"] = np.concatenate([batch["completion"], eos], axis=1)
    losses = [loss_of(Causal(), Learned(toy_params), toy_cfg, b)[0] for b in (batch, longer)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_without_prompt_the_first_token_is_given(toy_cfg, toy_params):
    batch = make_batch(toy_cfg, prompt_len=0)
    loss, metrics = loss_of(Causal(), Learned(toy_params), toy_cfg, batch)
    assert jnp.isfinite(loss) and metrics["loss"] == loss
