"""Training the filter: its loss by hand, that it learns, resumes, and what it reports."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm.heads.learn2pd import init_filter, load_filter
from train import learn2pd
from train.config import ConfigError
from train.learn2pd import FilterConfig, Rounds, evaluate, filter_loss

C = 8


def test_loss_by_hand():
    filter = init_filter(jax.random.key(0), 2).replace(
        w1=jnp.eye(2), b1=jnp.zeros(2), w2=jnp.eye(2), b2=jnp.array([0.0, -1.0])
    )
    rounds = Rounds(
        confidence=np.array([[0.5, 0.25]], np.float32),
        is_right=np.array([[True, False]]),
        undecided=np.array([[False, True]]),
    )
    o = np.array([0.5, -0.75])
    p = 1 / (1 + np.exp(-o))
    right, wrong = -np.log(p[0]), -np.log(1 - p[1])
    for decided, expected in (
        (1.0, (right + wrong) / 2),
        (0.5, (right / 2 + wrong) / 1.5),
        (0.0, wrong),
    ):
        weight = rounds.weight(decided)
        loss = filter_loss(filter, rounds.confidence, rounds.is_right, weight)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(evaluate(filter, rounds, 0.5, decided)["loss"], loss)


def test_gradient_against_finite_differences_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        c, y = jnp.asarray(rng.random((5, C))), jnp.asarray(rng.random((5, C)) < 0.5)
        weight = jnp.asarray(rng.random((5, C)))
        filter = init_filter(jax.random.key(1), C)
        gradient = jax.grad(filter_loss)(filter, c, y, weight)
        for name in ("w1", "b1", "w2", "b2"):
            value = getattr(filter, name)
            direction = jnp.asarray(rng.normal(size=value.shape), value.dtype)
            up, down = (
                filter_loss(filter.replace(**{name: value + sign * 1e-5 * direction}), c, y, weight)
                for sign in (1, -1)
            )
            slope = float((getattr(gradient, name) * direction).sum())
            np.testing.assert_allclose((up - down) / 2e-5, slope, rtol=1e-5, atol=1e-8)


def test_rates_count_undecided_positions_only():
    filter = init_filter(jax.random.key(0), 2).replace(
        w1=jnp.eye(2), b1=jnp.zeros(2), w2=100 * jnp.eye(2), b2=jnp.full(2, -50.0)
    )  # keeps what is above 0.5
    rounds = Rounds(
        confidence=np.array([[0.9, 0.9], [0.9, 0.1], [0.1, 0.9]], np.float32),
        is_right=np.array([[True, False], [False, True], [True, True]]),
        undecided=np.array([[True, True], [False, True], [False, False]]),
    )
    found = evaluate(filter, rounds, 0.5)
    # Undecided: right and kept, wrong and kept, right and not kept.
    assert found["false_positives"] == 1 and found["recall"] == 0.5
    assert found["wrong_accepted"] == 0.5
    assert found["decided_wrong"] == 1 / 3


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Rounds whose proposals are right if the block's first one is sure."""
    rng = np.random.default_rng(0)

    def record():
        confidence = rng.random((6, C)).astype(np.float32)
        is_right = np.repeat(confidence[:, :1] > 0.5, C, axis=1)
        return {"confidence": confidence, "is_right": is_right, "undecided": is_right | True}

    records = [{"rounds": record()} for _ in range(150)]
    monkeypatch.setattr(learn2pd, "open_records", lambda path: records)
    monkeypatch.setattr(learn2pd, "read_settings", lambda path: {"model": "m"})
    return records


def config(**changes):
    fields = dict(trajectories="t", num_steps=1200, learning_rate=1e-2, eval_every=300)
    return FilterConfig(**(fields | changes))


def test_it_learns_what_a_threshold_cannot_see(recorded, tmp_path):
    learn2pd.run(config(), tmp_path)
    loaded = load_filter(tmp_path / "filter", None)
    assert loaded.model == "m" and loaded.block_len == C
    found = evaluate(loaded, learn2pd.read_rounds("t")["test"], 0.5)
    assert found["recall"] > 0.7 and found["wrong_accepted"] < 0.15
    curves = json.loads((tmp_path / "acceptance.json").read_text())
    plain = [p["wrong_accepted"] for p in curves["confidence"] if p["recall"] > 0.1]
    assert plain and min(plain) > 0.3  # the confidence itself says nothing
    assert (tmp_path / "acceptance.png").stat().st_size > 10_000


def test_decided_positions_can_be_left_out(recorded, tmp_path):
    """Their labels are noise here, and half of all: with them sure proposals look unsure."""
    rng = np.random.default_rng(1)
    for record in recorded:
        rounds = record["rounds"]
        rounds["undecided"] = rng.random((6, C)) < 0.5
        rounds["is_right"] = rounds["is_right"] & (rounds["undecided"] | (rng.random((6, C)) < 0.3))
    rates = [
        evaluate(
            learn2pd.run(config(decided_weight=weight), tmp_path / str(weight)),
            learn2pd.read_rounds("t")["test"],
            0.7,
        )
        for weight in (0.0, 1.0)
    ]
    assert rates[0]["recall"] > 0.7 and rates[0]["wrong_accepted"] < 0.15
    assert rates[1]["recall"] < 0.3


def test_resuming_is_as_if_it_had_never_stopped(recorded, tmp_path):
    whole = learn2pd.run(config(), tmp_path / "whole")
    learn2pd.run(config(num_steps=600), tmp_path / "parts")
    parts = learn2pd.run(config(), tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 4
    # Once more: it is finished, and was not trained any further.
    jax.tree.map(np.testing.assert_array_equal, learn2pd.run(config(), tmp_path / "whole"), whole)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == lines[0]


def test_killed_before_the_filter_was_written(recorded, tmp_path, monkeypatch):
    """Also one that was finished already and goes on for longer."""
    whole = learn2pd.run(config(), tmp_path / "whole")
    learn2pd.run(config(num_steps=600), tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(learn2pd, "save_filter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn2pd.run(config(), tmp_path / "killed")
    learn2pd.run(config(), tmp_path / "killed")
    found = load_filter(tmp_path / "killed" / "filter", None)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_other_settings_and_missing_rounds_are_refused(recorded, tmp_path):
    learn2pd.run(config(num_steps=300), tmp_path)
    with pytest.raises(ConfigError, match=r"a filter of another .*_rate was 0\.01 and is 0\.1\)"):
        learn2pd.run(config(learning_rate=0.1), tmp_path)
    with pytest.raises(ConfigError, match="num_steps=0 must be at least 1"):
        config(num_steps=0)
    with pytest.raises(ConfigError, match=r"decided_weight=-1 must be in \[0, 1\]"):
        config(decided_weight=-1)
    with pytest.raises(ConfigError, match=r"tau=2 must be in \[0, 1\]"):
        config(tau=2)
    with pytest.raises(ConfigError, match="eval_evry"):
        from ml_collections import ConfigDict

        learn2pd.run(ConfigDict({**dataclasses.asdict(config()), "eval_evry": 3}), tmp_path)
    del recorded[3]["rounds"]
    with pytest.raises(ConfigError, match="collect with oracle=True"):
        learn2pd.run(config(), tmp_path / "other")
