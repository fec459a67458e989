import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm import vocab
from dlm.models import decoder
from dlm.trainable import Learned
from dlm.window import Window
from tests.train.test_masked_diffusion import judge, make_batch
from train.losses import mean_cross_entropy
from train.objectives import Context
from train.objectives.causal import Causal

CONTEXT = Context(jax.random.key(0))


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
    batch = make_batch(toy_cfg, rows=3)
    loss, _ = Causal(on_prompt=on_prompt).loss(Learned(toy_params), toy_cfg, batch, CONTEXT)
    forward = jax.jit(
        lambda params, tokens, positions: decoder.forward(
            params, toy_cfg, Window(tokens, positions, is_causal=True)
        )
    )
    total, count = 0.0, 0
    for row in range(3):
        start, length = int(batch["prompt_start"][row]), int(batch["completion_len"][row])
        prompt, completion = batch["prompt"][row, start:], batch["completion"][row, :length]
        tokens = jnp.concatenate([prompt, completion])[None]
        hidden = forward(toy_params, tokens, jnp.arange(tokens.shape[1])[None]).hidden
        log_probs = jax.nn.log_softmax(vocab.logits(vocab.head(toy_params), hidden))[0]
        for i in range(1, tokens.shape[1]):
            if on_prompt or i >= len(prompt):
                total -= float(log_probs[i - 1, tokens[0, i]])
                count += 1
    np.testing.assert_allclose(loss, total / count, rtol=1e-5)


def test_tokens_after_the_end_do_not_count(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    longer = dict(batch)
    eos = jnp.full((4, 3), toy_cfg.eos_token_id, jnp.int32)
    longer["completion"] = jnp.concatenate([batch["completion"], eos], axis=1)
    losses = [Causal().loss(Learned(toy_params), toy_cfg, b, CONTEXT)[0] for b in (batch, longer)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_without_prompt_the_first_token_is_given(toy_cfg, toy_params):
    batch = make_batch(toy_cfg, prompt_len=0)
    loss, metrics = Causal().loss(Learned(toy_params), toy_cfg, batch, CONTEXT)
    assert jnp.isfinite(loss) and metrics["loss"] == loss
