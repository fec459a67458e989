"""Decoding with an ideal model, which knows the marginals of the answers that are still possible.

ParallelBench's closed forms (arXiv:2510.04767, section 3), which tell strategies apart without any
network: what a strategy loses here is what committing several tokens at once costs.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.components import (
    FixedBlocks,
    Hierarchical,
    LocalLeap,
    Quota,
    Random,
    Threshold,
)
from decode.diffusion.loop import DiffusionMethod, init_state
from decode.diffusion.round import Round
from decode.diffusion.step import apply, make_frame
from kernels_pallas.unembed_stats import Noise, logits_stats

N = 4
ITEMS = tuple(range(1, N + 1))
NEW = N + 1  # the item that replaces another one
TASKS = {
    "copy": [ITEMS],
    "replace_random": [ITEMS[:i] + (NEW,) + ITEMS[i + 1 :] for i in range(N)],
    "shuffle": list(itertools.permutations(ITEMS)),
}


def marginals(answers, canvas, cfg):
    """[N, V]: laws of the positions, of the answers that agree with the canvas."""
    agree = [
        answer
        for answer in answers
        if all(c in (a, cfg.mask_token_id) for a, c in zip(answer, canvas, strict=True))
    ]
    law = np.zeros((N, cfg.vocab_size))
    for answer in agree or answers:
        law[np.arange(N), answer] += 1
    return law / law.sum(-1, keepdims=True)


def accuracy(cfg, task, method, runs=1):
    """Share of right answers, and tokens per step, over `runs` seeds in one batch."""
    method = method.replace(scheduler=FixedBlocks(None))
    state = init_state(cfg, method, [[1]] * runs, gen_len=N)
    while not bool(state.has_stopped.all()):
        canvas = np.asarray(state.tokens)[:, 1:]
        laws = np.stack([marginals(TASKS[task], row, cfg) for row in canvas])
        with np.errstate(divide="ignore"):
            logits = jnp.asarray(np.log(laws), jnp.float32).reshape(runs * N, -1)
        frame = make_frame(cfg, method, state)
        noise = None
        if method.temperature is not None:
            noise = Noise(frame.noise_key.reshape(runs * N, 2), frame.temperature)
        stats = logits_stats(logits, noise=noise)
        pick = lambda x: x.reshape(runs, N)
        token, log_prob = stats.token, stats.log_prob
        if noise is not None:
            token, log_prob = stats.sample, stats.sample_log_prob
        stats = dataclasses.replace(
            stats, **{k: None if v is None else pick(v) for k, v in vars(stats).items()}
        )
        round = Round(
            **vars(frame), stats=stats, proposal=pick(token), log_prob=pick(log_prob),
            confidence=pick(log_prob),
        )  # fmt: skip
        state = apply(cfg, method, state, round, ~state.has_stopped)
    right = [tuple(row) in TASKS[task] for row in np.asarray(state.tokens)[:, 1:].tolist()]
    return np.mean(right), N / float(state.num_forwards.mean())


@pytest.mark.parametrize("task", TASKS)
def test_one_token_per_step_is_always_right(toy_cfg, task):
    """Check 3: tokens per step = 1."""
    assert accuracy(toy_cfg, task, DiffusionMethod(rule=Quota(N))) == (1.0, 1.0)
    random = DiffusionMethod(confidence=Random(), rule=Quota(N), temperature=1.0)
    assert accuracy(toy_cfg, task, random, runs=8) == (1.0, 1.0)


@pytest.mark.parametrize(
    "rule", [Quota(1), Quota(2), Threshold(0.9), Hierarchical(0.9, 0.4), LocalLeap()]
)
def test_what_follows_from_the_prompt_loses_nothing_at_any_speed(toy_cfg, rule):
    assert accuracy(toy_cfg, "copy", DiffusionMethod(rule=rule))[0] == 1.0


@pytest.mark.parametrize("task", ["replace_random", "shuffle"])
def test_greedy_steps_of_half_the_answer_go_wrong(toy_cfg, task):
    assert accuracy(toy_cfg, task, DiffusionMethod(rule=Quota(1)))[0] == 0.0
    assert accuracy(toy_cfg, "shuffle", DiffusionMethod(rule=Quota(2)))[0] == 0.0


@pytest.mark.parametrize(
    ("task", "threshold", "right"),
    [
        ("replace_random", 0.76, 1.0),  # (n - 1) / n = 0.75 is what each old item has
        ("replace_random", 0.74, 0.0),
        ("shuffle", 0.51, 1.0),  # a position is 1 / m sure with m items left
        ("shuffle", 0.49, 0.0),  # the last two are committed together
    ],
)
def test_thresholds_are_right_from_where_the_theory_says(toy_cfg, task, threshold, right):
    assert accuracy(toy_cfg, task, DiffusionMethod(rule=Threshold(threshold)))[0] == right


def test_sampling_everything_at_once_follows_the_product_of_marginals(toy_cfg):
    runs = 2000
    method = DiffusionMethod(rule=Quota(1), temperature=1.0)
    # Shuffle: n! / n^n. Replacing: NEW exactly once.
    for task, right in [
        ("shuffle", math.factorial(N) / N**N),
        ("replace_random", N * (1 / N) * (1 - 1 / N) ** (N - 1)),
    ]:
        got = accuracy(toy_cfg, task, method, runs)[0]
        assert abs(got - right) < 4 * math.sqrt(right * (1 - right) / runs)


def test_two_at_a_time_can_be_completed_as_often_as_they_differ(toy_cfg):
    """Sampled in random order: the first two differ with (n - 1) / n, the last two with 1 / 2."""
    runs, right = 2000, (N - 1) / N * 1 / 2
    method = DiffusionMethod(confidence=Random(), rule=Quota(N // 2), temperature=1.0)
    got, tokens_per_step = accuracy(toy_cfg, "shuffle", method, runs)
    assert abs(got - right) < 4 * math.sqrt(right * (1 - right) / runs) and tokens_per_step == 2.0
