import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import Klass
from kernels_pallas.unembed_stats import logits_stats
from tests.lib.rounds import make_round

CFG = types.SimpleNamespace(vocab_size=5)


def commits(rule, logits, block_steps=range(99)):
    """What is committed at each step of [steps, W, V] logits, with nothing ever decided."""
    state, out = rule.init(CFG, 1, logits.shape[1]), []
    for block_step, z in zip(block_steps, jnp.asarray(logits, jnp.float32), strict=False):
        stats = logits_stats(z)
        view = make_round(np.exp(stats.log_prob)).replace(
            logits=z[None], stats=jax.tree.map(lambda x: x[None], stats),
            block_step=jnp.array([block_step]),
        )  # fmt: skip
        commit, state = rule.commit(view, state)
        out.append(np.flatnonzero(commit[0]).tolist())
    return out


def test_sure_positions_wait_until_they_have_been_stable():
    z = np.zeros((5, 3, 5))
    z[:, 0, 2] = 6.0  # sure and constant
    z[:, 1, :] = np.arange(5)[:, None] * np.eye(5)[1] + 5 * np.eye(5)[1]  # sure, still moving
    assert commits(Klass(0.9, 1e-4, 2), z)[:3] == [[], [], [0]]
    assert commits(Klass(0.9, 1e-4, 0), z)[0] == [0, 1]
    assert commits(Klass(0.9, 10.0, 1), z)[1] == [0, 1]  # position 2 is never sure


def test_positions_that_join_the_block_have_no_history():
    """What was said about a position before its block opened does not count."""
    rule, state = Klass(0.9, 0.01, 1), Klass().init(CFG, 1, 2)
    z = jnp.zeros((1, 2, 5)).at[..., 2].set(6.0)
    stats = jax.tree.map(lambda x: x[None], logits_stats(z[0]))
    commits = []
    for step, joined in enumerate([False, True, True]):
        view = make_round(np.exp(stats.log_prob[0]), eligible=[True, joined]).replace(
            logits=z, stats=stats, block_step=jnp.array([step]),
            in_block=jnp.array([[True, joined]]),
        )  # fmt: skip
        commit, state = rule.commit(view, state)
        commits.append(commit[0].tolist())
    assert commits == [[False, False], [True, False], [True, True]]


def test_history_starts_anew_in_each_block():
    z = np.zeros((4, 1, 5))
    z[..., 2] = 6.0
    assert commits(Klass(0.9, 0.01, 1), z, [0, 1, 0, 1]) == [[], [0], [], [0]]


def test_bad_values_are_refused(toy_cfg):
    with pytest.raises(ValueError, match="max_kl=-1 must be at least 0 nats"):
        Klass(max_kl=-1.0).validate(toy_cfg)
