"""Rows of finished diffusion states as plain Python, in the oracle's words."""

import jax
import numpy as np

from decode.diffusion.loop import decode, init_state
from tests.lib.batches import PROMPTS


def run(params, cfg, method, prompts=PROMPTS, **options):
    """The rows of a finished state; see `row`."""
    return rows(decode(params, cfg, method, init_state(cfg, method, prompts, **options)))[
        : len(prompts)
    ]


def rows(state):
    """All rows of a state, in one transfer."""
    state = jax.device_get(state)
    return [row(state, b) for b in range(len(state.tokens))]


def row(state, b):
    """What is reported of a row: its tokens behind the prompt, and for each when and how sure."""
    P, length = state.prompt_len, int(state.end[b]) - state.prompt_len
    return {
        "tokens": state.tokens[b, P : P + length].tolist(),
        "step_map": state.step_map[b, :length].tolist(),
        "num_forwards": int(state.num_forwards[b]),
        "confidence": state.confidence[b, :length].tolist(),
        "log_prob": state.log_prob[b, :length].tolist(),
    }


def assert_same(got, expected, reports=True):
    """One row is another, or what an oracle says it is."""
    for name in ("tokens", "step_map", "num_forwards"):
        assert got.get(name) == expected.get(name), name
    if reports:
        decided = np.array(expected["step_map"]) >= 0
        for name in ("confidence", "log_prob"):
            a, b = np.array(got[name])[decided], np.array(expected[name])[decided]
            np.testing.assert_allclose(a, b, atol=2e-3, rtol=2e-3, err_msg=name)
