import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.lib.objectives import make_batch
from tests.lib.weights import init_params
from train import step as step_lib
from train.config import ConfigError, OptimConfig
from train.objectives.causal import Causal
from train.optimizer import is_decayed, learning_rate_schedule, make_optimizer, update_ema
from train.step import init_state


def test_schedule():
    optim = OptimConfig(learning_rate=1.0, warmup_steps=10, decay_steps=110, end_factor=0.1)
    rate = learning_rate_schedule(optim)
    assert rate(0) == 0 and rate(5) == 0.5 and rate(10) == 1
    np.testing.assert_allclose(rate(60), 0.55, rtol=1e-6)
    np.testing.assert_allclose([rate(110), rate(500)], 0.1, rtol=1e-6)
    twice = learning_rate_schedule(dataclasses.replace(optim, accumulate=2))
    assert twice(5) == 1  # ten steps are five updates


def test_schedule_without_decay():
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, decay_steps=10, end_factor=1.0)
    np.testing.assert_allclose([learning_rate_schedule(optim)(i) for i in (2, 7, 20)], 1.0)


def test_schedule_that_falls_at_the_end():
    """LLaDA's fine-tuning: warm-up, constant, down over the last tenth."""
    optim = OptimConfig(
        learning_rate=1.0, warmup_steps=10, decay_steps=200, end_factor=0.1, decay_share=0.1
    )
    rates = [learning_rate_schedule(optim)(i) for i in (5, 10, 100, 180, 190, 200, 300)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.55, 0.1, 0.1], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"optim\.decay_share=0 must be in \(0, 1\]"):
        dataclasses.replace(optim, decay_share=0)


def test_norms_and_biases_are_not_decayed(toy_cfg):
    cfg = dataclasses.replace(toy_cfg, qkv_bias=True, qk_norm=True)
    decayed = is_decayed(init_params(jax.random.key(0), cfg))
    flags = {
        jax.tree_util.keystr(path, simple=True, separator="/"): flag
        for path, flag in jax.tree_util.tree_leaves_with_path(decayed)
    }
    assert {name for name, flag in flags.items() if not flag} == {
        "final_norm", "layers/attention_norm", "layers/mlp_norm", "layers/attention/q_norm",
        "layers/attention/k_norm", "layers/attention/q_bias", "layers/attention/k_bias",
        "layers/attention/v_bias",
    }  # fmt: skip
    of_heads = {"b": 0, "b1": 0, "w1": 0, "block": {"b": 0, "rebound": 0}}
    assert is_decayed(of_heads) == {
        "b": False, "b1": False, "w1": True, "block": {"b": False, "rebound": True},
    }  # fmt: skip
    optim = OptimConfig(learning_rate=1.0, weight_decay=0.5, decay_steps=10, end_factor=1.0)
    tx = make_optimizer(optim)
    params = {"w": jnp.ones((2, 2)), "norm": jnp.ones((2, 2))}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.5)
    np.testing.assert_allclose(updates["norm"], 0)


def test_gradients_are_clipped():
    optim = OptimConfig(learning_rate=1.0, decay_steps=10, clip_norm=1e-3, eps=1.0)
    tx = make_optimizer(optim)
    params = {"w": jnp.zeros(4)}
    updates, _ = tx.update({"w": jnp.full(4, 1e3)}, tx.init(params), params)
    # With Adam's eps that large an update is about the clipped gradient.
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 1e-3, rtol=1e-2)


@pytest.mark.exhaustive(every=4)
def test_accumulated_halves_are_one_whole_batch(toy_cfg):
    """Two steps on half batches change parameters and averages as one step on both."""
    params = init_params(jax.random.key(0), toy_cfg)
    batch = make_batch(toy_cfg, rows=8)
    # A mean over tokens is the mean of the halves' means only if both count as many tokens.
    batch["completion_len"] = jnp.full(8, 3, jnp.int32)
    batch["prompt_start"] = jnp.zeros(8, jnp.int32)
    halves = [jax.tree.map(lambda x, i=i: x[i::2], batch) for i in range(2)]
    optim = OptimConfig(
        learning_rate=1e-2, decay_steps=8, weight_decay=0.1, ema_decay=0.5, warmup_steps=2
    )
    step = jax.jit(step_lib.train_step, static_argnames=("cfg", "objective", "optim"))
    results = []
    for accumulate, batches in ((1, [batch, batch]), (2, [*halves, *halves])):
        one = dataclasses.replace(
            optim, accumulate=accumulate, decay_steps=8 * accumulate, warmup_steps=2 * accumulate
        )
        state = step_lib.init_state(params, optim=one)
        for part in batches:
            state, metrics = step(
                state, part, jax.random.key(0), cfg=toy_cfg, objective=Causal(), optim=one
            )
        results.append((state.params, state.ema, metrics["learning_rate"]))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), results[0][0], params)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_moving_average_by_hand():
    optim = OptimConfig(learning_rate=1.0, ema_decay=0.5)
    ema = {"w": jnp.array([1.0])}
    ema = update_ema(ema, {"w": jnp.array([2.0])}, jnp.int32(1), optim)
    first = 2 / 11 * 1 + 9 / 11 * 2  # (1 + 1) / (10 + 1) is below 0.5
    np.testing.assert_allclose(ema["w"], first, rtol=1e-6)
    ema = update_ema(ema, {"w": jnp.array([4.0])}, jnp.int32(100), optim)
    np.testing.assert_allclose(ema["w"], first / 2 + 2, rtol=1e-6)
    # Of narrow parameters it is wide: what it moves by would be lost.
    optim = OptimConfig(learning_rate=1.0, ema_decay=0.999, keep_best=True)
    state = init_state({"w": jnp.ones(1, jnp.bfloat16)}, optim=optim)
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.ema["w"].dtype == state.best["w"].dtype == jnp.float32
    ema = update_ema(state.ema, {"w": jnp.full(1, 1.25, jnp.bfloat16)}, jnp.int32(10**6), optim)
    np.testing.assert_allclose(ema["w"], 1.00025, rtol=1e-6)
