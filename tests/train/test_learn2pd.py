"""Training the filter: its loss by hand, that it learns, resumes, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from configs import filter_learn2pd
from dlm.heads.learn2pd import Filter, filter_specs, init_filter, load_filter
from dlm.params import init_from_specs, param_specs
from dlm.tokenizer import word_tokenizer
from dlm.trainable import Learned
from tests.lib import toys
from tests.lib.mains import run_main
from tests.lib.models import TOY_CFG
from tests.lib.objectives import CONTEXT
from tests.lib.runs import assert_same, without_times
from train import loop
from train.collect import records as records_lib
from train.collect.records import Rounds
from train.config import ConfigError
from train.metrics import read_metrics
from train.objectives.learn2pd import FilterOfRounds, Learn2PDLoss
from train.objectives.masked_diffusion import MaskedDiffusion

C = 8


def loss_of(filter, batch, **fields):
    context = CONTEXT.replace(is_validation=True)
    return Learn2PDLoss(**fields).loss(Learned({}, filter), None, batch, context)


def test_loss_by_hand():
    filter = init_filter(jax.random.key(0), 2).replace(
        w1=jnp.eye(2), b1=jnp.zeros(2), w2=jnp.eye(2), b2=jnp.array([0.0, -1.0])
    )
    batch = {
        "confidence": jnp.array([[0.5, 0.25]]),
        "is_right": jnp.array([[True, False]]),
        "undecided": jnp.array([[False, True]]),
    }
    o = np.array([0.5, -0.75])
    p = 1 / (1 + np.exp(-o))
    right, wrong = -np.log(p[0]), -np.log(1 - p[1])
    for decided, expected in (
        (1.0, (right + wrong) / 2),
        (0.5, (right / 2 + wrong) / 1.5),
        (0.0, wrong),
    ):
        loss, metrics = loss_of(filter, batch, decided_weight=decided)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert metrics["loss"] == loss


def test_gradient_against_finite_differences_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        own = init_from_specs(jax.random.key(1), filter_specs(C), jnp.float64)
        right, undecided = jnp.asarray(rng.random((2, 5, C)) < 0.5)
        batch = {
            "confidence": jnp.asarray(rng.random((5, C))), "is_right": right,
            "undecided": undecided,
        }  # fmt: skip
        loss = jax.jit(lambda own: loss_of(Filter(**own), batch, decided_weight=0.3)[0])
        gradient = jax.grad(loss)(own)
        for name, value in own.items():
            direction = jnp.asarray(rng.normal(size=value.shape), value.dtype)
            up, down = (loss(own | {name: value + sign * 1e-5 * direction}) for sign in (1, -1))
            slope = float((gradient[name] * direction).sum())
            np.testing.assert_allclose((up - down) / 2e-5, slope, rtol=1e-5, atol=1e-8)


def test_rates_count_undecided_positions_only():
    filter = init_filter(jax.random.key(0), 2).replace(
        w1=jnp.eye(2), b1=jnp.zeros(2), w2=100 * jnp.eye(2), b2=jnp.full(2, -50.0)
    )  # keeps what is above 0.5
    batch = {
        "confidence": jnp.array([[0.9, 0.9], [0.9, 0.1], [0.1, 0.9]]),
        "is_right": jnp.array([[True, False], [False, True], [True, True]]),
        "undecided": jnp.array([[True, True], [False, True], [False, False]]),
    }
    found = loss_of(filter, batch, tau=0.5)[1]
    # Undecided: right and kept, wrong and kept, right and not kept.
    assert found["false_positives"] == 1 and found["recall"] == 0.5
    assert found["wrong_accepted"] == 0.5
    np.testing.assert_allclose(found["decided_wrong"], 1 / 3, rtol=1e-6)


# ---- Runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A model without its weights."""
    tokenizer = word_tokenizer(toys.Copy().pieces)
    cfg = dataclasses.replace(
        TOY_CFG, n_kv_heads=4, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), param_specs(cfg))
    path = tmp_path_factory.mktemp("filter") / "model"
    dlm.save(path, dlm.LanguageModel(params, cfg, tokenizer))
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture
def recorded(monkeypatch):
    """Rounds whose proposals are right if the block's first one is sure."""
    rng = np.random.default_rng(0)

    def record():
        confidence = rng.random((6, C)).astype(np.float32)
        is_right = np.repeat(confidence[:, :1] > 0.5, C, axis=1)
        return {"confidence": confidence, "is_right": is_right, "undecided": is_right | True}

    found = [{"rounds": record()} for _ in range(150)]
    settings = {"model": "m", "confidence": "Margin", "oracle": True}
    monkeypatch.setattr(records_lib, "open_records", lambda path: found)
    monkeypatch.setattr(records_lib, "read_settings", lambda path: settings)
    return found, settings


@pytest.fixture
def config(recorded, model_path):
    """Settings of a run on those rounds, `train__seed=3` and the like changed."""

    def make(**changes):
        config = filter_learn2pd.get_config("waiting_line,runlocal")
        config.update_from_flattened_dict(
            {
                "data.task.path": "t", "data.completion_len": C,
                "train.init_from": str(model_path), "train.num_steps": 600,
                "train.eval_every": 300, "checkpoint.every": 300, "log.every": 300,
                "optim.learning_rate": 1e-2,
            }
        )  # fmt: skip
        named = {name.replace("__", "."): value for name, value in changes.items()}
        config.update_from_flattened_dict(named)
        return config

    return make


@pytest.mark.exhaustive(every=4)
def test_it_learns_what_a_threshold_cannot_see(config, tmp_path):
    result = loop.run(config(train__objective__tau=0.5), tmp_path)
    loaded = load_filter(result.model_path, None)
    assert (loaded.model, loaded.confidence, loaded.block_len) == ("m", "Margin", C)
    folders = (f"--filter={result.model_path}", "--rounds=t", f"--out={tmp_path}")
    assert "wrong among accepted" in run_main("scripts.acceptance", *folders)
    curves = json.loads((tmp_path / "acceptance.json").read_text())
    found = curves["filter"][0]
    assert found["tau"] == 0.5 and found["recall"] > 0.7 and found["wrong_accepted"] < 0.15
    plain = [p["wrong_accepted"] for p in curves["confidence"] if p["recall"] > 0.1]
    assert plain and min(plain) > 0.3  # the confidence itself says nothing
    assert (tmp_path / "acceptance.png").stat().st_size > 10_000


@pytest.mark.exhaustive(every=4)
def test_decided_positions_can_be_left_out(recorded, config, tmp_path):
    """Their labels are noise here, and half of all: with them sure proposals look unsure."""
    rng = np.random.default_rng(1)
    for record in recorded[0]:
        rounds = record["rounds"]
        rounds["undecided"] = rng.random((6, C)) < 0.5
        rounds["is_right"] = rounds["is_right"] & (rounds["undecided"] | (rng.random((6, C)) < 0.3))
    test = {name: jnp.asarray(value) for name, value in Rounds("t", "test").arrays.items()}
    rates = []
    for weight in (0.0, 1.0):
        settings = config(train__objective__decided_weight=weight, train__num_steps=400)
        result = loop.run(settings, tmp_path / str(weight))
        rates.append(loss_of(load_filter(result.model_path, None), test, tau=0.7)[1])
    assert rates[0]["recall"] > 0.7 and rates[0]["wrong_accepted"] < 0.15
    assert rates[1]["recall"] < 0.3


@pytest.mark.exhaustive(every=4)
def test_resuming_is_as_if_it_had_never_stopped(recorded, config, tmp_path):
    """Also what was best before it was stopped is remembered."""
    for record in recorded[0][8::10]:  # held-out rounds that say the opposite
        record["rounds"]["is_right"] = ~record["rounds"]["is_right"]
    steps = {"train__eval_every": 10, "checkpoint__every": 10, "log__every": 5}
    whole = loop.run(config(train__num_steps=40, **steps), tmp_path / "whole")
    loop.run(config(train__num_steps=20, **steps), tmp_path / "parts")
    parts = loop.run(config(train__num_steps=40, **steps), tmp_path / "parts")
    assert_same(load_filter(parts.model_path, None), load_filter(whole.model_path, None))
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")

    # What is kept is what was best, though later steps made it worse.
    lines = [line for line in read_metrics(tmp_path / "whole") if "valid/loss" in line]
    losses = [line["valid/loss"] for line in lines]
    assert len(losses) == 4 and losses == sorted(losses) and losses[0] < losses[1]
    valid = {name: jnp.asarray(value) for name, value in Rounds("t", "valid").arrays.items()}
    loss, metrics = loss_of(load_filter(whole.model_path, None), valid, decided_weight=0.0)
    np.testing.assert_allclose(loss, losses[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["recall"], lines[0]["valid/recall"], rtol=1e-6)


def test_what_does_not_fit_is_refused(recorded, config, tmp_path):
    def refused(message, folder="new", **changes):
        with pytest.raises(ConfigError, match=message) as error:
            loop.run(config(**changes), tmp_path / folder)
        assert "\n" not in str(error.value)

    (tmp_path / "old").mkdir()  # of a trainer that filters once had
    (tmp_path / "old" / "config.json").write_text(json.dumps({"trajectories": "t", "tau": 0.9}))
    refused(r"old' is not a run's: its config.json has no 'checkpoint'; choose another", "old")
    refused(r"data.completion_len=7 must be 8", data__completion_len=7)
    refused(r"data.prompt_len=1 must be 0", data__prompt_len=1)
    refused(r"decided_weight=-1\S* must be in \[0, 1\]", train__objective__decided_weight=-1.0)
    refused(r"tau=2\S* must be in \[0, 1\]", train__objective__tau=2.0)
    refused(r"model.dtype='bfloat16' must be 'float32' for a filter", model__dtype="bfloat16")
    refused(r"num_eval_batches=2 must be 1 with data.batch_size=0", train__num_eval_batches=2)
    refused(r"keep_best=True needs data.valid", data__valid=None)
    refused(r"data.train has 720 rows.* must be a multiple of mesh.data .* = 7", mesh__data=7)
    rounds = {"confidence": np.zeros((4, 8)), "index": np.arange(4)}
    with pytest.raises(ConfigError, match=r"learns from 'completion', and data.task gives conf"):
        loop._check_batch(MaskedDiffusion(), rounds)
    wrong = {"make": "train.objectives.learn2pd:FilterOfRounds", "block_len": 9}
    refused(r"train.trainable: block_len=9 must be 8, the rounds'", train__trainable=wrong)
    with pytest.raises(ValueError, match=r"a filter learns from .*:Rounds, and .* is Copy"):
        FilterOfRounds().fitted(toys.Copy())
    refused(r"split='nope' must be one of train, valid, test", data__train__split="nope")
    found, settings = recorded
    settings["oracle"] = False
    refused("collect with oracle=True")
    settings["oracle"] = True
    del found[9:]
    with pytest.raises(ValueError, match="9 examples, fewer than 10"):
        Rounds("t", "test")
