import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import Credit, FixedBlocks, Probability, SparseCredit, Threshold
from decode.diffusion.loop import DiffusionMethod
from kernels_pallas.unembed_stats import logits_stats
from tests.lib.rounds import make_round
from tests.lib.rows import assert_same, run

V = 8
CFG = types.SimpleNamespace(vocab_size=V)


def trace(confidence, logits, undecided=None):
    """Confidence, proposal and state after each step of [steps, W, V] logits."""
    state = confidence.init(CFG, 1, logits.shape[1])
    rounds = []
    for step, z in enumerate(jnp.asarray(logits, jnp.float32)):
        given_ids = confidence.given_ids(state) if "given" in confidence.needs else None
        stats = logits_stats(z, given_ids=None if given_ids is None else given_ids[0])
        view = make_round(np.exp(stats.log_prob), eligible=undecided).replace(
            proposal=stats.token[None], log_prob=stats.log_prob[None], logits=z[None],
            stats=jax.tree.map(lambda x: x[None], stats), block_step=jnp.array([step]),
        )  # fmt: skip
        view, state = confidence.measure(view, state)
        rounds.append((view.confidence[0], view.proposal[0], state))
    return rounds


def random_logits(seed, steps=6, W=5, scale=2.0):
    return np.random.default_rng(seed).normal(size=(steps, W, V)) * scale


def test_without_fusion_it_is_probability():
    logits = random_logits(0)
    for (got, token, _), (expected, plain, _) in zip(
        trace(Credit(alpha=0.0), logits), trace(Probability(), logits), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)
        np.testing.assert_array_equal(token, plain)


def test_credit_of_constant_logits_in_closed_form():
    z = np.tile(random_logits(1, steps=1), (5, 1, 1))
    p = np.exp(z[0] - np.log(np.exp(z[0]).sum(-1, keepdims=True)))
    for step, (_, _, credit) in enumerate(trace(Credit(gamma=0.5, beta=0.6), z), 1):
        expected = p.max(-1) ** 0.5 * (1 - 0.6**step) / (1 - 0.6)
        np.testing.assert_allclose(credit[0].max(-1), expected, rtol=1e-5)
        assert ((credit[0] > 0).sum(-1) == 1).all()


def test_a_stable_favourite_is_never_less_sure_than_without_credit():
    z = np.tile(random_logits(2, steps=1), (6, 1, 1))
    for (fused, _, _), (plain, _, _) in zip(
        trace(Credit(), z), trace(Probability(), z), strict=True
    ):
        assert (fused >= plain).all()


def test_an_alternating_favourite_gathers_less_than_a_stable_one():
    stable, other = np.zeros((6, 1, V)), np.zeros((6, 1, V))
    stable[:, :, 3] = 2.0
    other[::2, :, 3] = other[1::2, :, 4] = 2.0
    assert trace(Credit(), stable)[-1][2].max() > trace(Credit(), other)[-1][2].max()


def test_no_memory_keeps_only_the_present_step():
    logits = random_logits(3)
    credit = trace(Credit(beta=0.0), logits)[-1][2]
    assert ((credit[0] > 0).sum(-1) == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_slots_equal_the_table_while_they_suffice(seed):
    logits = random_logits(seed)
    undecided = np.array([True, True, False, True, True])
    for (sure, token, _), (expected, best, _) in zip(
        trace(SparseCredit(num_slots=6), logits, undecided),
        trace(Credit(), logits, undecided),
        strict=True,
    ):
        np.testing.assert_array_equal(token[undecided], best[undecided])
        np.testing.assert_allclose(sure[undecided], expected[undecided], atol=2e-5)


@pytest.mark.exhaustive(every=4)
def test_slots_keep_their_digits_next_to_certainty():
    logits = np.zeros((3, 2, V))
    logits[:, 0, 1], logits[:, 1, 1] = 25.0, 28.0
    sparse, dense = trace(SparseCredit(), logits)[-1][0], trace(Credit(), logits)[-1][0]
    assert sparse[0] < sparse[1] < 0
    np.testing.assert_allclose(sparse, dense, rtol=1e-4)


def test_slots_equal_the_table_in_the_loop(toy_cfg, toy_params):
    method = DiffusionMethod(FixedBlocks(4), rule=Threshold(0.6))
    expected = run(toy_params, toy_cfg, method.replace(confidence=Credit()), gen_len=8)
    got = run(toy_params, toy_cfg, method.replace(confidence=SparseCredit()), gen_len=8)
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)


def test_what_makes_no_sense_is_refused(toy_cfg, toy_params):
    with pytest.raises(ValueError, match=r"beta=1\.5 must be in"):
        Credit(beta=1.5).validate(toy_cfg)
    method = DiffusionMethod(FixedBlocks(4), confidence=SparseCredit(), temperature=1.0)
    with pytest.raises(ValueError, match="SparseCredit is greedy"):
        run(toy_params, toy_cfg, method, gen_len=8)
