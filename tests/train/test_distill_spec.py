"""DistillSpec's divergences by hand, their gradients, and a draft model that gets better."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from configs import distill_draft
from dlm.heads.draft_lm import Draft
from dlm.trainable import Learned
from tests.lib.heads import models, simulated_length
from tests.lib.models import laws_of
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from train import loop
from train.config import ConfigError
from train.objectives.distill_spec import DIVERGENCES, DistillSpec


def by_hand(divergence, p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    kl = lambda p, q: (p * np.log(p / q)).sum()
    return {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "tv": np.abs(p - q).sum() / 2,
        "nla": -np.log(np.minimum(p, q).sum()),
    }[divergence]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_by_hand(toy_cfg, toy_params, divergence):
    batch, learned = make_batch(toy_cfg), models(toy_cfg, toy_params)
    draft = learned.own
    tokens = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    P, values, accepted, right = batch["prompt"].shape[1], [], [], {}
    for b in range(len(tokens)):
        start = int(batch["prompt_start"][b])
        laws = [
            laws_of(own, cfg, tokens[b, start:], temperature=1.3)
            for own, cfg in ((toy_params, toy_cfg), (draft.params, draft.cfg))
        ]
        for i in range(max(P, start + 1), P + int(batch["completion_len"][b])):
            p, q = (law[i - 1 - start] for law in laws)
            values.append(by_hand(divergence, p, q, beta=0.3))
            accepted.append(np.minimum(p, q).sum())
            right[b, i] = q.argmax() == tokens[b, i]
    objective = DistillSpec(divergence=divergence, beta=0.3, temperature=1.3)
    loss, metrics = loss_of(objective, learned, toy_cfg, batch)
    np.testing.assert_allclose(loss, np.mean(values), rtol=1e-4)
    np.testing.assert_allclose(metrics["acceptance"], np.mean(accepted), rtol=1e-4)
    # The draft behind a root at i - 2 is about token i.
    behind = [{(b, i - 2 - j): r for (b, i), r in right.items() if i >= 2 + j} for j in range(4)]
    length = simulated_length(behind)
    np.testing.assert_allclose(metrics["acceptance_length"], length, rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_divergences_in_float64(divergence):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        log_p = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(3, 7))))
        z = jnp.asarray(rng.normal(size=(3, 7)))
        objective = DistillSpec(divergence=divergence, beta=0.3)
        loss = lambda z: objective._divergence(log_p, jax.nn.log_softmax(z))[0].sum()
        gradient, step = jax.jit(jax.grad(loss))(z), 1e-6
        steps = step * np.eye(z.size).reshape(-1, *z.shape)
        differences = jax.jit(jax.vmap(lambda by: loss(z + by) - loss(z - by)))(steps)
        np.testing.assert_allclose(gradient.ravel(), differences / (2 * step), atol=1e-8)


def test_no_gradient_reaches_the_target(toy_cfg, toy_params):
    batch, learned = make_batch(toy_cfg), models(toy_cfg, toy_params)
    loss = lambda learned: DistillSpec().loss(learned, toy_cfg, batch, CONTEXT)[0]
    gradient = jax.jit(jax.grad(loss))(learned)
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(gradient.target))
    assert any(np.asarray(x).any() for x in jax.tree.leaves(gradient.own))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_draft_model_comes_closer_to_its_target(scan_target, scan_draft, tmp_path):
    config = distill_draft.get_config("scan,runlocal")
    config.train.init_from = str(scan_target)
    config.train.trainable.checkpoint = str(tmp_path / "nowhere")
    with pytest.raises((ConfigError, FileNotFoundError), match="nowhere"):
        loop.run(config, tmp_path / "distilled")
    shutil.copytree(scan_draft, tmp_path / "draft")
    said = {"eos_token_id": dlm.load(scan_draft).cfg.eos_token_id, "repetition_penalty": 1.5}
    (tmp_path / "draft" / "generation_config.json").write_text(json.dumps(said))
    config.train.trainable.checkpoint = str(tmp_path / "draft")
    result = loop.run(config, tmp_path / "distilled")
    before, after = dlm.load(scan_draft), dlm.load(result.model_path)
    assert after.cfg == before.cfg and after.tokenizer is not None
    assert after.generation == {"repetition_penalty": 1.5}
    lm = dlm.load(scan_target)
    batch = make_batch(lm.cfg)
    losses = [
        loss_of(DistillSpec(), Learned(lm.params, Draft(x.params, x.cfg)), lm.cfg, batch)[0]
        for x in (before, after)
    ]
    assert losses[1] < losses[0]


def test_refusals():
    for wrong, message in (
        (dict(divergence="l2"), "divergence='l2' must be one of"),
        (dict(beta=1.0), r"beta=1.0 must be in \(0, 1\)"),
        (dict(temperature=0.0), r"temperature=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillSpec(**wrong)
