"""LayerSkip: its loss out of forwards of the first layers, its curricula, and a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from configs import layer_skip
from decode.speculative.drafters.dynamic_exit import DynamicExit
from decode.speculative.loop import SpeculativeMethod
from dlm.trainable import Learned
from tests.lib.gradients import check_gradients
from tests.lib.models import random_model
from tests.lib.objectives import loss_of, make_batch
from tests.lib.speculation import random_prompts, run, texts
from train import loop
from train.objectives import Context
from train.objectives.causal import Causal
from train.objectives.layer_skip import LayerSkip

L = 5


@pytest.fixture(scope="module")
def deep(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, n_layers=L)
    return cfg, random_model(2, cfg)


@pytest.fixture(scope="module")
def by_layer(deep):
    """Of exits behind 1 to L layers: the loss and accuracy of a model of those layers."""
    cfg, params = deep
    batch, found = make_batch(cfg), []
    for n in range(1, L + 1):
        layers = jax.tree.map(lambda x, n=n: x[:n], params["layers"])
        cut = dataclasses.replace(cfg, n_layers=n)
        loss, metrics = loss_of(Causal(), Learned(params | {"layers": layers}), cut, batch)
        found.append((float(loss), float(metrics["accuracy"])))
    return np.array(found)


def of(deep, objective, seed=0, progress=0.0, is_validation=False):
    cfg, params = deep
    context = Context(jax.random.key(seed), jnp.float32(progress), is_validation)
    return jax.device_get(loss_of(objective, Learned(params), cfg, make_batch(cfg), context))


def weights(scale):
    """Card: e(l) by hand."""
    early = [scale * sum(range(layer + 1)) for layer in range(L - 1)]
    return np.array([*early, L - 1 + scale * sum(range(L - 1))])


def test_the_loss_is_that_of_every_exit(deep, by_layer):
    """In validation all of them count, whatever the curriculum; nothing is left out."""
    objective = LayerSkip(exit_scale=0.3, max_dropout=0.9, rotation=3, ramp=1.0)
    loss, metrics = of(deep, objective, progress=0.1, is_validation=True)
    e = weights(0.3)
    np.testing.assert_allclose(loss, (e * by_layer[:, 0]).sum() / e.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["model_loss"], by_layer[-1, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], by_layer[-1, 1], rtol=1e-5)
    np.testing.assert_allclose(metrics["exit_loss"], by_layer[:-1, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["exit_accuracy"], by_layer[:-1, 1].mean(), rtol=1e-5)


def test_exits_take_turns(deep, by_layer):
    """Of two one learns in a step: those behind 1 and 3 layers, or behind 2 and 4."""
    objective, seen = LayerSkip(exit_scale=0.5, max_dropout=0.0, rotation=2), set()
    for seed in range(6):
        metrics = of(deep, objective, seed)[1]
        means = [by_layer[[0, 2], 0].mean(), by_layer[[1, 3], 0].mean()]
        (first,) = np.flatnonzero(np.isclose(means, metrics["exit_loss"], rtol=1e-5))
        e = weights(0.5) * np.array([first == 0, first == 1, first == 0, first == 1, True])
        np.testing.assert_allclose(metrics["loss"], (e * by_layer[:, 0]).sum() / e.sum(), rtol=1e-5)
        seen.add(int(first))
    assert seen == {0, 1}


def test_exits_begin_to_learn_from_the_last_one(deep, by_layer):
    """With ramp = 0.5: at 0.125 a quarter of the depth, at 0.5 all of it."""
    objective = LayerSkip(exit_scale=0.5, max_dropout=0.0, rotation=1, ramp=0.5)
    for progress, exits in ((0.125, [3]), (0.25, [2, 3]), (0.5, [0, 1, 2, 3]), (0.9, [0, 1, 2, 3])):
        metrics = of(deep, objective, progress=progress)[1]
        np.testing.assert_allclose(metrics["exit_loss"], by_layer[exits, 0].mean(), rtol=1e-5)
    metrics = of(deep, objective, progress=0.0)[1]
    np.testing.assert_allclose(metrics["loss"], by_layer[-1, 0], rtol=1e-5)


def test_deeper_layers_are_left_out_more_often():
    batch = {"completion": np.zeros((20_000, 1))}
    kept = lambda objective, progress: np.asarray(
        objective._kept(jax.random.key(0), batch, L, Context(jax.random.key(0), progress))
    )
    found = kept(LayerSkip(max_dropout=0.4), 0.0)
    assert (found[..., 0] == found[..., 1]).all()
    expected = 0.4 * (2 ** (np.arange(L) / (L - 1)) - 1)
    np.testing.assert_allclose(1 - found[..., 0].mean(axis=0), expected, atol=0.012)
    assert kept(LayerSkip(max_dropout=0.4, dropout_grows=True), 0.0).all()
    grown = 1 - kept(LayerSkip(max_dropout=0.4, dropout_grows=True), 0.5)[..., 0].mean(axis=0)
    np.testing.assert_allclose(grown, (2**0.5 - 1) * expected, atol=0.012)


@pytest.mark.exhaustive(every=4)
def test_a_row_is_read_without_its_layers(deep):
    """Its loss is that of the model without them."""
    cfg, params = deep
    objective, batch = LayerSkip(exit_scale=0.0, max_dropout=0.9), make_batch(cfg, rows=1)
    left_out = set()
    for seed in range(5):
        context = Context(jax.random.key(seed))
        _, dropping = jax.random.split(context.key)
        kept = np.asarray(objective._kept(dropping, batch, L, context))[0, :, 0]
        layers = jax.tree.map(lambda x, kept=kept: x[kept], params["layers"])
        cut = dataclasses.replace(cfg, n_layers=int(kept.sum()))
        expected, _ = loss_of(Causal(), Learned(params | {"layers": layers}), cut, batch)
        loss, _ = loss_of(objective, Learned(params), cfg, batch, context)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        left_out.add(L - int(kept.sum()))
    assert len(left_out) > 1


@pytest.mark.exhaustive
def test_gradients_are_those_of_differences(deep):
    """Finite differences, through layers that some rows leave out, with and without remat."""
    cfg, params = deep
    batch = make_batch(cfg)
    for remat in (False, True):
        objective = LayerSkip(exit_scale=1.0, max_dropout=0.6, rotation=2, remat=remat)
        value = lambda p, o=objective: o.loss(Learned(p), cfg, batch, Context(jax.random.key(4)))[0]
        check_gradients(value, jax.tree.map(lambda x: x / 2, params))


def test_refusals():
    for wrong, message in (
        (dict(exit_scale=-1.0), "exit_scale=-1.0 must be at least 0"),
        (dict(max_dropout=1.0), r"max_dropout=1.0 must be in \[0, 1\)"),
        (dict(rotation=0), "rotation=0 must be at least 1"),
        (dict(ramp=2.0), r"ramp=2.0 must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerSkip(**wrong)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.exhaustive
def test_a_model_that_was_trained_drafts_for_itself(tmp_path):
    result = loop.run(layer_skip.get_config("scan,runlocal"), tmp_path / "run")
    lm = dlm.load(result.model_path)
    prompts = random_prompts(lm.cfg, 4)
    plain, drafted = (
        run(lm.params, lm.cfg, SpeculativeMethod(*drafter), prompts)
        for drafter in ((), (DynamicExit((1, 2, 3), prior=0.9),))
    )
    assert texts(plain, 4) == texts(drafted, 4)
    assert int(drafted.draft_forwards.sum()) > 0
