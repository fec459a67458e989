import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import DualCache, FixedBlocks, Random, SubBlocks
from decode.diffusion.loop import DiffusionMethod
from decode.diffusion.revisers.remdm import ReMDM
from kernels_pallas.unembed_stats import gumbel_noise
from tests.lib.batches import LENGTHS
from tests.lib.rounds import make_round
from tests.lib.rows import run

N = 40_000


def sigma_at(reviser, i):
    """Eq. of the paper, in fractions of time: alpha = i / S."""
    alpha, later = i / reviser.steps, (i + 1) / reviser.steps
    sigma_max = min(1, (1 - later) / alpha) if alpha else 1
    eta = reviser.eta
    sigma = min(eta, sigma_max) if reviser.schedule == "cap" else eta * sigma_max
    return sigma, (later - (1 - sigma) * alpha) / (1 - alpha)


def chain(reviser, seed=0):
    """N independent positions as one row: who is decided before each round, and at the end."""
    undecided, states = np.ones(N, bool), []
    key = jax.random.split(jax.random.key(seed), (reviser.steps, N))
    for i, noise in enumerate(jax.random.key_data(key)):
        states.append(~undecided)
        view = make_round(np.full(N, 0.5), eligible=undecided)
        view = view.replace(block_step=jnp.array([i]), noise_key=noise[None])
        revision, _ = reviser.revise(view, view.eligible & False, ())
        commit, back = np.asarray(revision.commit[0]), np.asarray(revision.take_back[0])
        assert not (commit & ~undecided).any() and not (back & undecided).any()
        assert bool(revision.hold[0]) == (i + 1 < reviser.steps)
        undecided = undecided & ~commit | back
    return [*states, ~undecided]


def is_close(count, total, p):
    """Within 4.5 standard deviations of a binomial."""
    return abs(count - total * p) <= 4.5 * np.sqrt(total * p * (1 - p)) + 1e-6


@pytest.mark.parametrize(
    "reviser",
    [
        ReMDM(5, 0.0),
        ReMDM(5, 0.3),
        ReMDM(5, 1.0),
        ReMDM(5, 0.6, "rescale"),
        ReMDM(4, 1.0, "rescale"),
        ReMDM(1, 0.5),
        ReMDM(2, 1.0),
    ],
)
def test_transitions_and_marginals_are_those_of_the_paper(reviser):
    states = chain(reviser)
    for i in range(reviser.steps):
        sigma, decide = sigma_at(reviser, i)
        now, then = states[i], states[i + 1]
        assert is_close((now & ~then).sum(), now.sum(), sigma)
        assert is_close((~now & then).sum(), (~now).sum(), min(decide, 1))
        assert is_close(then.sum(), N, (i + 1) / reviser.steps)  # whatever sigma is
    assert states[-1].all()


def test_without_sigma_it_is_ancestral_sampling():
    """Nothing is taken back, and each position is decided in a round drawn uniformly."""
    states = np.array(chain(ReMDM(8, 0.0), seed=1))
    assert (states[1:] >= states[:-1]).all()
    counts = np.bincount(8 - states[1:].sum(0), minlength=8)
    chi2 = ((counts - N / 8) ** 2 / (N / 8)).sum()
    assert chi2 < 30  # the 0.9999 quantile with 7 degrees of freedom


def test_its_draws_are_neither_the_proposals_nor_those_of_random_confidence():
    noise = jax.random.key_data(jax.random.split(jax.random.key(3), (1, N)))
    view = make_round(np.full(N, 0.5)).replace(noise_key=noise)
    revision, _ = ReMDM(2, 0.0).revise(view, view.eligible, ())
    decided = np.asarray(revision.commit[0])
    random = np.asarray(Random().measure(view, ())[0].confidence[0])
    gumbel = np.asarray(gumbel_noise(noise[0], jnp.arange(1)))[:, 0]
    for other in (random, gumbel):
        assert is_close((decided & (other > np.median(other))).sum(), N, 0.25)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_blocks_take_exactly_their_steps(toy_cfg, toy_params, steps):
    method = DiffusionMethod(FixedBlocks(4), DualCache(), reviser=ReMDM(steps, 0.7, "rescale"))
    for row, gen_len in zip(
        run(toy_params, toy_cfg, method, gen_len=LENGTHS), LENGTHS, strict=True
    ):
        assert row["num_forwards"] == steps * -(-gen_len // 4)
        assert toy_cfg.mask_token_id not in row["tokens"]


def test_one_step_decides_everything(toy_cfg, toy_params):
    rows = run(toy_params, toy_cfg, DiffusionMethod(FixedBlocks(4), reviser=ReMDM(1)), gen_len=12)
    for row in rows:
        assert row["step_map"] == [0] * 4 + [1] * 4 + [2] * 4


def test_parts_of_blocks_still_get_done(toy_cfg, toy_params):
    method = DiffusionMethod(SubBlocks(6, 2), reviser=ReMDM(2, 0.5))
    for row in run(toy_params, toy_cfg, method, gen_len=12):
        assert row["num_forwards"] <= 2 * (2 + 2)
        assert toy_cfg.mask_token_id not in row["tokens"]


def test_bad_values_are_refused(toy_cfg):
    for reviser, message in [
        (ReMDM(0), "steps=0 must be at least 1"),
        (ReMDM(4, 2.0), r"eta=2 must be in \[0, 1\]"),
        (ReMDM(4, 0.5, "loop"), "schedule='loop' must be 'cap' or 'rescale'"),
    ]:
        with pytest.raises(ValueError, match=message):
            reviser.validate(toy_cfg)
