"""Prophet by hand; its golden traces are in tests/decode/diffusion/test_golden.py."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import FixedBlocks, Prophet, Quota, Threshold
from decode.diffusion.loop import DiffusionMethod, init_state
from tests.lib import batches
from tests.lib.batches import LENGTHS, assert_same
from tests.lib.rounds import make_round

run = functools.partial(batches.run, gen_len=LENGTHS)
INF = float("inf")


@pytest.mark.parametrize("block_len", [4, None])
def test_without_hope_it_is_the_base_sampler_and_without_doubt_one_forward(
    toy_cfg, toy_params, block_len
):
    """Card, check 1: thresholds that are never and always met."""
    method = DiffusionMethod(FixedBlocks(block_len), rule=Quota(4))
    plain = run(toy_params, toy_cfg, method)
    never = method.replace(stopper=Prophet(3, early=INF, mid=INF, late=INF))
    assert_same(run(toy_params, toy_cfg, never), plain)
    at_once = method.replace(stopper=Prophet(3, early=0.0, mid=0.0, late=0.0))
    state = run(toy_params, toy_cfg, at_once)
    assert state.num_forwards.tolist() == [1] * 4 and (np.asarray(state.step_map) < 1).all()
    assert [int((state.step_map[b] == 0).sum()) for b in range(4)] == LENGTHS


def test_until_the_exit_everything_is_as_without_it(toy_cfg, toy_params):
    """Check 2: what was decided before the exit, and the steps saved."""
    method = DiffusionMethod(FixedBlocks(4), rule=Quota(4))
    plain = run(toy_params, toy_cfg, method)
    state = run(toy_params, toy_cfg, method.replace(stopper=Prophet(4, 4, None, 3.0, 1.5, 0.8)))
    exits = np.asarray(state.num_forwards)
    assert (exits < plain.num_forwards).any() and (exits > 1).any()
    for b, length in enumerate(LENGTHS):
        before = np.asarray(plain.step_map[b, :length]) < exits[b] - 1
        P = state.prompt_len
        for x in ("tokens", "step_map"):
            now, then = (np.asarray(getattr(s, x)[b]) for s in (state, plain))
            now, then = (v[P:] if x == "tokens" else v for v in (now, then))
            assert (now[:length][before] == then[:length][before]).all()
        assert (np.asarray(state.step_map[b, :length])[~before] == exits[b] - 1).all()


def exits(stopper, gap, step, decided=()):
    """Whether a row of 8 with this gap between the logits of its answer exits at a 0-based step."""
    view = make_round([0.5] * 8)
    stats = view.stats.replace(second_log_prob=view.stats.log_prob - jnp.asarray(gap)[None])
    undecided = jnp.asarray([[g not in decided for g in range(8)]])
    view = view.replace(stats=stats, row_step=jnp.array([step]), undecided=undecided)
    return bool(stopper.fill(view, ())[0][0])


def test_thresholds_by_phase():
    """Checks 3 and 4: progress of exactly 0.33 and 0.67 belongs to the later phase."""
    stopper = Prophet(2, 3, total_steps=100)
    first = lambda gap: next(s for s in range(100) if exits(stopper, [gap] * 8, s)) + 1
    assert [first(gap) for gap in (7.5, 6.0, 5.0, 4.9, 2.5)] == [1, 33, 33, 67, 67]
    assert not any(exits(stopper, [2.4] * 8, s) for s in range(100))


def test_the_answer_region_is_what_counts():
    gap = [0, 0, 9, 9, 9, 0, 0, 0]
    assert exits(Prophet(2, 3), gap, 0) and exits(Prophet(2, 3), gap, 0, decided=(3,))
    assert not exits(Prophet(1, 3), gap, 0)
    assert exits(Prophet(6, 5), [0] * 6 + [9, 9], 0)  # clipped to the canvas
    assert not exits(Prophet(8, 5), [9] * 8, 99)  # nothing is left of it


@pytest.mark.parametrize(
    ("stopper", "message"),
    [
        (Prophet(-1), "answer_start=-1 must be in"),
        (Prophet(1, 0), "answer_len=0 must be at least 1"),
        (Prophet(1, 5, 0), "total_steps=0 must be at least 1"),
    ],
)
def test_bad_values_are_refused(toy_cfg, stopper, message):
    with pytest.raises(ValueError, match=message):
        init_state(toy_cfg, DiffusionMethod(stopper=stopper, rule=Threshold(0.9)), [[1]], gen_len=4)
