"""Dream's default sampler, alg = origin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import FixedBlocks
from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.diffusion.rules.origin import Origin
from tests.lib.rounds import committed, make_round


def run(params, cfg, method, prompts, **options):
    return decode(params, cfg, method, init_state(cfg, method, prompts, **options))


def times(steps, eps=1e-3):
    return np.linspace(1, eps, steps + 1)


def test_one_step_fills_everything(toy_cfg, toy_params):
    """Card, check 2."""
    method = DiffusionMethod(FixedBlocks(None), rule=Origin(1, eps=0.9))
    state = run(toy_params, toy_cfg, method, [[1, 2], [3]], gen_len=12)
    assert np.asarray(state.num_forwards).tolist() == [1, 1]
    assert (np.asarray(state.step_map) == 0).all()


def test_expected_commits_per_step():
    """Card, check 2: n (1 - s/t) on average, whatever the confidences."""
    n, steps, t = 2**15, 8, times(8)
    commit = jax.jit(lambda rule, view: rule.commit(view, ())[0])
    rng = np.random.default_rng(0)
    view = make_round(rng.uniform(0, 1, n), eligible=rng.random(n) < 0.5)
    masks = int(view.eligible.sum())
    for i in range(steps):
        view = view.replace(
            block_step=jnp.array([i]),
            noise_key=jax.random.bits(jax.random.key(i), (1, n, 2), jnp.uint32),
        )
        positions = np.flatnonzero(commit(Origin(steps), view)[0])
        q = 1 - t[i + 1] / t[i] if i < steps - 1 else 1.0
        assert abs(len(positions) - masks * q) <= 4 * np.sqrt(masks * q * (1 - q))
        assert np.asarray(view.eligible)[0, positions].all()
        high = np.asarray(view.confidence)[0, positions] > np.log(0.5)
        assert abs(high.mean() - 0.5) < 2 / np.sqrt(len(positions))


def test_steps_past_the_last_commit_everything():
    for step in (4, 5, 9, 1000):
        view = make_round(np.full(50, 0.5)).replace(
            block_step=jnp.array([step]), noise_key=jax.random.bits(jax.random.key(0), (1, 50, 2))
        )
        assert committed(Origin(5, eps=0.9), view) == [list(range(50))]


def test_positions_are_decided_at_independent_times(toy_cfg, toy_params):
    """Through the loop: at step i with probability t_i - t_{i+1}, the last one t_{steps-1}."""
    n, length, steps = 512, 12, 5
    method = DiffusionMethod(FixedBlocks(None), rule=Origin(steps), temperature=1.0)
    state = run(toy_params, toy_cfg, method, [[1]] * n, gen_len=length)
    step_map, t = np.asarray(state.step_map), times(steps)
    p = np.append(-np.diff(t)[:-1], t[-2])
    counts = np.stack([(step_map == i).sum(axis=1) for i in range(steps)])  # [steps, n]
    expected = p * n * length
    chi2 = ((counts.sum(axis=1) - expected) ** 2 / expected).sum()
    assert chi2 < 23.6  # 4 degrees of freedom: the 0.9999 quantile is 23.5
    binomial = length * p * (1 - p)  # rows would vary more if positions moved together
    np.testing.assert_allclose(counts.var(axis=1), binomial, rtol=0.25)
    for i in range(steps):  # and no position is favoured: 4.5 standard errors
        share = (step_map == i).mean(axis=0)
        assert (np.abs(share - p[i]) < 4.5 * np.sqrt(p[i] * (1 - p[i]) / n)).all()


def test_steps_may_idle_as_published_or_not(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(None), rule=Origin(16))
    idle = run(toy_params, toy_cfg, method, [[1], [2]], gen_len=4, seeds=3)
    used = [len(np.unique(row)) for row in np.asarray(idle.step_map)]
    assert max(used) <= 4 and int(idle.num_forwards.max()) > 4
    assert int(idle.num_forwards.max()) <= 16
    method = method.replace(rule=Origin(16, may_idle=False))
    busy = run(toy_params, toy_cfg, method, [[1], [2]], gen_len=4, seeds=3)
    for row, forwards in zip(np.asarray(busy.step_map), busy.num_forwards, strict=True):
        assert np.unique(row).tolist() == list(range(int(forwards)))


@pytest.mark.exhaustive(every=4)
def test_each_row_equals_itself_alone(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(None), rule=Origin(6), temperature=0.8)
    prompts = [[1, 2, 3], [4], [5, 6]]
    together = run(toy_params, toy_cfg, method, prompts, gen_len=9, seeds=5, prompt_len=7)
    for b in (0, 1):
        alone = run(toy_params, toy_cfg, method, [prompts[b]], gen_len=9, seeds=[5 + b])
        np.testing.assert_array_equal(alone.step_map[0], together.step_map[b])
        np.testing.assert_array_equal(alone.tokens[0, -9:], together.tokens[b, -9:])
    assert len({tuple(row) for row in np.asarray(together.step_map).tolist()}) == 3


@pytest.mark.parametrize(
    ("rule", "message"),
    [(Origin(0), "steps=0 must be at least 1"), (Origin(4, eps=2.0), "eps=2 must be in")],
)
def test_bad_values_are_refused(toy_cfg, rule, message):
    with pytest.raises(ValueError, match=message):
        rule.validate(toy_cfg)
