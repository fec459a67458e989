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
