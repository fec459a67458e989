"""Prompts, and what a drafter and a target make of them."""

import numpy as np

from decode.speculative.loop import decode, init_state, prefill


def run(params, cfg, method, prompts, *, gen_len=12, chunk=8, **options):
    """The finished state."""
    state = init_state(cfg, method, prompts, gen_len=gen_len, chunk=chunk, **options)
    state = prefill(params, cfg, method, state)
    return decode(params, cfg, method, state)


def texts(state, num):
    """The tokens behind the prompts of the first rows."""
    tokens, start, length = (np.asarray(x) for x in (state.tokens, state.prompt_len, state.length))
    return [tokens[b, start[b] : length[b]].tolist() for b in range(num)]


def random_prompts(cfg, num, seed=0):
    """Prompts of 1 to 13 tokens."""
    rng = np.random.default_rng(seed)
    high = min(cfg.vocab_size, 20)
    return [rng.integers(0, high, rng.integers(1, 14)).tolist() for _ in range(num)]


def check_statistics(state, depth):
    """What a finished state reports adds up; `depth` is J."""
    histogram = np.asarray(state.acceptance_histogram)
    assert (histogram.sum(axis=1) == state.num_forwards).all()
    written = np.asarray(state.length - state.prompt_len)
    committed = (histogram * np.arange(1, depth + 2)).sum(axis=1)
    assert (committed >= written).all() and (committed - written <= depth).all()
    step_map = np.asarray(state.step_map)
    for b, n in enumerate(written):
        steps = step_map[b, :n]
        assert (np.diff(steps) >= 0).all() and (step_map[b, n:] == -1).all()
        assert set(steps) == set(range(int(state.num_forwards[b])))


def assert_same_law(ours, theirs, first=0):
    """Two tokens of many texts each, from `first` on, come up about as often in both."""
    counts = []
    for rows in (ours, theirs):
        codes = [a * 1000 + b for a, b, *_ in ([*row[first:], 0, 0] for row in rows)]
        counts.append(np.bincount(codes, minlength=10**6))
    a, b = counts
    there = a + b > 10
    chi_square = ((a - b)[there] ** 2 / (a + b)[there]).sum()
    assert chi_square < there.sum() + 4 * np.sqrt(2 * there.sum())
