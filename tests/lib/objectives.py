"""Batches, and losses as one program each; what an objective shows its model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.models import decoder
from dlm.trainable import Learned
from train.objectives import Context

CONTEXT = Context(jax.random.key(0))


def make_batch(cfg, *, rows=4, prompt_len=5, completion_len=6, seed=0):
    """Rows with prompts of other lengths, one of them cut short by the end of the text."""
    rng = np.random.default_rng(seed)
    ids = cfg.vocab_size - 3  # no MASK, EOS or PAD
    start = rng.integers(0, prompt_len + 1, rows).astype(np.int32)
    prompt = rng.integers(0, ids, (rows, prompt_len)).astype(np.int32)
    prompt[np.arange(prompt_len) < start[:, None]] = cfg.pad_token_id
    completion = rng.integers(0, ids, (rows, completion_len)).astype(np.int32)
    length = rng.integers(1, completion_len + 1, rows).astype(np.int32)
    completion[np.arange(completion_len) >= length[:, None] - 1] = cfg.eos_token_id
    return jax.device_put(
        {
            "prompt": prompt,
            "prompt_start": start,
            "completion": completion,
            "completion_len": length,
        }
    )


@functools.partial(jax.jit, static_argnames=("objective", "cfg"))
def loss_of(objective, learned, cfg, batch, context=CONTEXT):
    """The loss and its metrics, as one program."""
    return objective.loss(learned, cfg, batch, context)


def value(objective, params, cfg, batch, context, beside=None):
    """Loss and metrics of an objective that is about a model alone."""
    return objective.loss(Learned(params, beside=beside), cfg, batch, context)


def judge(logits, targets):
    """Log-probabilities of the targets, and whether they are the arg-max."""
    log_probs = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return right, jnp.argmax(logits, axis=-1) == targets


class Recorder:
    """Stands in for the forward and keeps what it was given."""

    def __init__(self, monkeypatch, forward=decoder.forward):
        self.calls = []
        self._forward = forward
        monkeypatch.setattr(decoder, "forward", self)

    def __call__(self, params, cfg, window, **kwargs):
        self.calls.append(window)
        return self._forward(params, cfg, window, **kwargs)


@functools.partial(jax.jit, static_argnames=("objective", "cfg"))
def loss_and_canvas(params, batch, context, *, objective, cfg):
    """The loss, its metrics, and the tokens that the model was shown, in one forward."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        loss, metrics = value(objective, params, cfg, batch, context)
    (window,) = recorder.calls
    return loss, metrics, window.tokens


@functools.partial(jax.jit, static_argnames=("objective", "cfg"))
def mask_and_canvas(batch, context, objective, cfg):
    """What the objective hands to the forward: attention (None: full), its range, the tokens."""

    def forward(params, cfg, window, **kwargs):
        return decoder.ForwardOutput(jnp.zeros((*window.tokens.shape, cfg.d_model)), None)

    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, forward)
        objective.predict({}, cfg, batch, context)
    (window,) = recorder.calls
    assert not window.is_causal
    return window.mask, window.range, window.tokens


def mixing_forward(params, cfg, window, **kwargs):
    """Stands in for the transformer, whose norms are float32: smooth, and all tokens matter."""
    x = params["embed"][window.tokens]
    return decoder.ForwardOutput(jnp.tanh(x + x.mean(axis=1, keepdims=True)), None)


def assert_gradient_is_that_of_differences(objective, cfg, batch, context, beside=None, scale=1.0):
    """Along random directions in float64, with a stand-in for the transformer."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "forward", mixing_forward)
        rng = np.random.default_rng(0)
        shape = (cfg.vocab_size, 6)
        params = {name: scale * rng.normal(size=shape) for name in ("embed", "unembed")}
        steps = {name: rng.normal(size=(5, *shape)) for name in params}

        @jax.jit
        def slopes(params, steps, context, beside):
            loss = lambda params: value(objective, params, cfg, batch, context, beside)[0]
            moved = lambda step, size: jax.tree.map(lambda x, dx: x + size * dx, params, step)
            gradient = jax.grad(loss)(params)
            products = jax.tree.map(lambda g, dx: (g[None] * dx).sum((1, 2)), gradient, steps)
            differences = jax.lax.map(
                lambda step: (loss(moved(step, 1e-5)) - loss(moved(step, -1e-5))) / 2e-5, steps
            )
            return sum(products.values()), differences

        analytic, numeric = slopes(params, steps, context, beside)
        assert analytic.dtype == jnp.float64 and (jnp.abs(analytic) > 1e-3).all()
        np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-8)
