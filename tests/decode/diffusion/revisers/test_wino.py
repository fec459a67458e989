"""WINO by hand; its golden traces are in tests/decode/diffusion/test_golden.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import NarrowOut, WideIn
from decode.diffusion.round import log_confidence
from tests.lib.rounds import committed, make_round


@pytest.mark.parametrize(("masks", "most"), [(4, 4), (6, 5), (10, 7), (40, 20)])
def test_at_most_a_share_of_the_masks_is_committed(masks, most):
    """min(max(0.7 n, 5), 20), the surest first."""
    confidence = np.linspace(0.99, 0.7, masks)
    assert committed(WideIn(0.6), make_round(confidence)) == [[*range(most)]]


def test_the_threshold_of_commits_is_strict():
    round = make_round([0.6, 0.61, 0.5])
    round = round.replace(confidence=jnp.where(jnp.arange(3) == 0, log_confidence(0.6), -0.4)[None])
    assert committed(WideIn(0.6), round) == [[1, 2]]


@jax.jit
def revised(reviser, round, commit, last):
    revision, accepted = reviser.revise(round, commit, last)
    return revision.commit, revision.take_back, accepted


@pytest.mark.parametrize(
    ("num_accepted", "last", "block_step", "taken"),
    [
        (2, 3, 2, [1, 3]),  # fewer than in the step before, the least sure first
        (2, 2, 2, [1]),
        (2, 1, 2, []),
        (1, 9, 2, []),  # so that blocks get done
        (2, 1, 0, [1, 2, 3]),  # nothing was before the first step of a block
    ],
)
def test_what_the_shadow_doubts_is_taken_back(num_accepted, last, block_step, taken):
    shadow = jnp.log(jnp.array([[0.95, 0.1, 0.5, 0.3, 0.9, 0.01, 0.01]]))
    shadow = shadow.at[0, 4].set(log_confidence(0.9))  # just enough
    eligible = np.arange(7) >= 5
    round = make_round([0.5] * 7, eligible=eligible)
    round = round.replace(shadow_log_prob=shadow, block_step=jnp.array([block_step]))
    commit = jnp.asarray(eligible & (np.arange(7) < 5 + num_accepted))[None]
    kept, take_back, accepted = revised(NarrowOut(0.9), round, commit, jnp.array([last]))
    assert np.flatnonzero(take_back[0]).tolist() == taken
    assert (kept == commit).all() and accepted.tolist() == [num_accepted]
