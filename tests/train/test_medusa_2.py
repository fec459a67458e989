"""Medusa-2: its loss out of others' losses, two learning rates, and a run whose heads fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlm
from configs import draft_heads
from decode.speculative.drafters.medusa import Medusa
from decode.speculative.loop import SpeculativeMethod
from dlm.heads import medusa
from dlm.heads.medusa_2 import MedusaJoint
from dlm.trainable import Learned
from tests.lib.heads import TREE, fresh, init, shaken
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.speculation import random_prompts, run, texts
from train import loop
from train.objectives.causal import Causal
from train.objectives.medusa import MedusaLoss
from train.objectives.medusa_2 import Medusa2Loss


def test_the_loss_is_that_of_the_model_and_of_the_heads(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    own = shaken(fresh("medusa", toy_cfg, toy_params)[1])
    params = Learned(toy_params, own, toy_params)
    loss, metrics = loss_of(Medusa2Loss(weight=0.3), params, toy_cfg, batch)
    of_heads, expected = loss_of(MedusaLoss(), Learned(toy_params, own), toy_cfg, batch)
    of_model, plain = loss_of(Causal(), Learned(toy_params), toy_cfg, batch)
    np.testing.assert_allclose(loss, of_model + 0.3 * of_heads, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_1"], plain["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy_3"], expected["accuracy_3"], rtol=1e-6)


def test_a_model_that_is_what_it_was_has_nothing_to_learn_from_itself(toy_cfg, toy_params):
    batch = make_batch(toy_cfg)
    own = fresh("medusa", toy_cfg, toy_params)[1]

    @jax.jit
    def loss(model):
        params = Learned(model, own, toy_params)
        return Medusa2Loss(weight=0, from_itself=True).loss(params, toy_cfg, batch, CONTEXT)[0]

    gradient = jax.device_get(jax.jit(jax.grad(loss))(toy_params))
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-4
    moved = jax.tree.map(lambda x: np.float32(1.1) * np.asarray(x), toy_params)
    assert float(loss(moved)) > float(loss(toy_params))


def test_the_model_learns_at_its_own_rate(toy_cfg, toy_params):
    joint = MedusaJoint(num_heads=3, model_rate=0.25)
    own = init(joint, toy_cfg)
    own = joint.start(toy_cfg, toy_params, own)
    for ours, theirs in zip(*map(jax.tree.leaves, (own["model"], toy_params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ones = jax.tree.map(jnp.ones_like, own)
    slow = joint.rate(ones)
    assert {float(x.max()) for x in jax.tree.leaves(slow["model"])} == {0.25}
    assert optax.global_norm(slow["heads"]) == optax.global_norm(ones["heads"])
    with pytest.raises(ValueError, match="model_rate=-1 must be at least 0"):
        MedusaJoint(model_rate=-1)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_heads_fit_the_model_they_were_trained_with(scan_target, tmp_path):
    config = draft_heads.get_config("scan,medusa,runlocal")
    config.train.init_from = str(scan_target)
    first = loop.run(config, tmp_path / "medusa")
    config = draft_heads.get_config("scan,medusa_2,runlocal")
    config.train.init_from = str(scan_target)
    config.train.trainable.heads = str(first.model_path)
    result = loop.run(config, tmp_path / "joint")
    before, after = dlm.load(scan_target), dlm.load(result.model_path)
    assert bool((before.params["embed"] != after.params["embed"]).any())
    _, own = medusa.load(tmp_path / "joint" / "heads", after)
    with pytest.raises(ValueError, match="train heads for it"):
        medusa.load(tmp_path / "joint" / "heads", before)
    prompts = random_prompts(after.cfg, 8)
    expected = texts(run(after.params, after.cfg, SpeculativeMethod(), prompts), 8)
    state = run(after.params, after.cfg, SpeculativeMethod(Medusa(own, TREE)), prompts)
    assert texts(state, 8) == expected
