"""AdaSPEC: which tokens are learned, by hand, and a run from target to draft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import distill_draft
from tests.lib.heads import models
from tests.lib.models import laws_of, random_model
from tests.lib.objectives import CONTEXT, loss_of, make_batch
from tests.lib.tiers import more
from train import loop
from train.config import ConfigError
from train.objectives.adaspec import AdaSpec, largest
from train.objectives.distill_spec import DistillSpec


def with_reference(toy_cfg, toy_params):
    learned = models(toy_cfg, toy_params)
    return learned.replace(beside=random_model(4, learned.own.cfg))


def test_everything_is_plain_distillation(toy_cfg, toy_params):
    batch, learned = make_batch(toy_cfg), with_reference(toy_cfg, toy_params)
    ours = loss_of(AdaSpec(share=1.0), learned, toy_cfg, batch)
    theirs = loss_of(DistillSpec(), learned, toy_cfg, batch)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1]["acceptance"], theirs[1]["acceptance"], rtol=1e-6)


@pytest.mark.parametrize("share", [0.4, *more(0.25, 0.9)])
def test_the_loss_by_hand(toy_cfg, toy_params, share):
    batch, learned = make_batch(toy_cfg), with_reference(toy_cfg, toy_params)
    draft = learned.own
    tokens = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    P, found = batch["prompt"].shape[1], []
    for b in range(len(tokens)):
        start = int(batch["prompt_start"][b])
        p, q, r = (
            laws_of(own, cfg, tokens[b, start:])
            for own, cfg in (
                (toy_params, toy_cfg),
                (draft.params, draft.cfg),
                (learned.beside, draft.cfg),
            )
        )
        for i in range(max(P, start + 1), P + int(batch["completion_len"][b])):
            at = i - 1 - start
            kl = lambda other, at=at, p=p: (p[at] * np.log(p[at] / other[at])).sum()
            found.append((kl(q) - kl(r), kl(q)))
    num = int(np.ceil(share * len(found) - 1e-4))
    best = sorted(found, key=lambda pair: -pair[0])[:num]
    loss, metrics = loss_of(AdaSpec(share=share), learned, toy_cfg, batch)
    np.testing.assert_allclose(loss, np.mean([kl for _, kl in best]), rtol=1e-4)
    np.testing.assert_allclose(metrics["gap"], np.mean([gap for gap, _ in best]), rtol=1e-3)


def test_only_the_draft_learns(toy_cfg, toy_params):
    batch, learned = make_batch(toy_cfg), with_reference(toy_cfg, toy_params)
    loss = lambda learned: AdaSpec().loss(learned, toy_cfg, batch, CONTEXT)[0]
    gradient = jax.jit(jax.grad(loss))(learned)
    frozen = jax.tree.leaves((gradient.target, gradient.beside))
    assert all(not np.asarray(x).any() for x in frozen)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(gradient.own))


def test_the_largest_of_those_that_count():
    values = jnp.asarray([[3.0, 1.0, 2.0, 9.0], [2.0, 2.0, 0.0, -1.0]])
    counts = jnp.asarray([[1, 1, 1, 0], [1, 1, 0, 0]], bool)
    expected = {0.2: [(0, 0)], 0.4: [(0, 0), (0, 2)], 0.5: [(0, 0), (0, 2), (1, 0)]}
    for share, chosen in expected.items():
        assert list(zip(*np.nonzero(largest(values, counts, share)), strict=True)) == chosen
    assert largest(values, counts, 1.0).sum() == 5
    assert not largest(values, counts & False, 0.4).any()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_with_a_reference(scan_target, scan_draft, tmp_path):
    for name, arg in (("reference", "scan,runlocal"), ("adaspec", "scan,adaspec,runlocal")):
        config = distill_draft.get_config(arg)
        config.train.init_from = str(scan_target)
        config.train.trainable.checkpoint = str(scan_draft)
        if name == "adaspec":
            with pytest.raises((ConfigError, ValueError), match=r"reference='' must be the folder"):
                loop.run(config, tmp_path / name)
            config.train.trainable.reference = str(scan_target)
            with pytest.raises((ConfigError, ValueError), match="they must be alike"):
                loop.run(config, tmp_path / "other")
            config.train.trainable.reference = str(tmp_path / "reference" / "model")
            name = "again"
        result = loop.run(config, tmp_path / name)
    assert np.isfinite(result.metrics["loss"]) and "gap" in result.metrics


def test_refusals():
    with pytest.raises(ValueError, match=r"share=0.0 must be in \(0, 1\]"):
        AdaSpec(share=0.0)
