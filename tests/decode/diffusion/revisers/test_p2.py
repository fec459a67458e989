import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import P2, FixedBlocks, Quota
from decode.diffusion.loop import DiffusionMethod, init_state, stream
from tests.lib.batches import PROMPTS, run
from tests.lib.rounds import make_round

L = 6


def revise(eta, planned, confidence, decided, step, steps=L):
    given = make_round([confidence], eligible=[~np.asarray(decided)]).replace(
        standing_log_prob=jnp.log(jnp.asarray([planned], jnp.float32)),
        block_step=jnp.array([step]),
    )
    revision, _ = P2(steps, eta).revise(given, jnp.zeros((1, L), bool), ())
    return [np.flatnonzero(x[0]).tolist() for x in (revision.commit, revision.take_back)]


def test_one_ranking_of_decided_and_undecided_positions():
    decided = [True, True, False, False, False, False]
    planned, confidence = [0.1, 0.99, 1, 1, 1, 1], [1, 1, 0.9, 0.2, 0.5, 0.8]
    assert revise(1.0, planned, confidence, decided, step=2) == [[2, 5], [0]]
    assert revise(0.0, planned, confidence, decided, step=2) == [[2], []]
    assert revise(1.0, planned, confidence, decided, step=5) == [[2, 3, 4, 5], []]
    assert revise(1.0, planned, confidence, decided, step=0, steps=3) == [[2], [0]]
    # Ties go to what stands, even against what is certain.
    assert revise(0.0, planned, [1, 1, 1, 1, 1, 1], decided, step=1) == [[], []]
    behind = [False, True, False, False, False, False]
    assert revise(0.0, [1] * L, [1] * L, behind, step=0) == [[], []]


def test_a_planner_that_knows_keeps_what_is_right():
    """Of a block half wrong, an oracle's zeros and ones keep the right half at the end."""
    decided, right = np.arange(L) < 4, np.array([1, 0, 1, 0, 1, 1], bool)
    planned = np.where(right, 1.0, 1e-6)
    _, taken = revise(1.0, planned, [0.5] * L, decided, step=3)
    assert taken == [1, 3]


def test_without_eta_it_is_the_quota(toy_cfg, toy_params):
    planned, quota = (
        run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(4), **choice), gen_len=8)
        for choice in ({"reviser": P2(4, 0.0)}, {"rule": Quota(4)})
    )
    for name in ("tokens", "step_map", "num_forwards"):
        np.testing.assert_array_equal(getattr(planned, name), getattr(quota, name))


@pytest.mark.parametrize("planner", ["self", "shadow"])
def test_the_undecided_are_what_the_schedule_says(toy_cfg, toy_params, planner):
    method = DiffusionMethod(FixedBlocks(4), reviser=P2(2, 1.5, planner))
    state = init_state(toy_cfg, method, PROMPTS, gen_len=8)
    left = [
        (np.asarray(state.step_map) < 0).sum(axis=1)
        for state in stream(toy_params, toy_cfg, method, state)
    ]
    np.testing.assert_array_equal(left, np.tile([[6], [4], [2], [0]], len(PROMPTS)))


def test_bad_values_are_refused(toy_cfg, toy_dream):
    with pytest.raises(ValueError, match="planner='bert' must be 'self' or 'shadow'"):
        P2(planner="bert").validate(toy_cfg)
    with pytest.raises(ValueError, match=r"shifted_logits=True\): use 'self'"):
        P2(planner="shadow").validate(toy_dream[0])
