"""What the tests of drafters compare with."""

import dataclasses

import numpy as np
import pytest

from decode.speculative.loop import SpeculativeMethod
from tests.lib.speculation import random_prompts, run, texts


@pytest.fixture(scope="session")
def plain(toy_cfg, toy_params):
    """A target, 64 prompts, and its greedy texts, of which some end by themselves.

    The target's config, the prompts, the texts behind them, and [64, S] int32 with both.
    """
    prompts = random_prompts(toy_cfg, 64)
    state = run(toy_params, toy_cfg, SpeculativeMethod(), prompts)
    used = np.bincount(np.concatenate(texts(state, 64)), minlength=toy_cfg.vocab_size)
    eos = int(np.argsort(used)[-4])  # comes up now and then
    cfg = dataclasses.replace(toy_cfg, eos_token_id=eos, mask_token_id=None)
    state = run(toy_params, cfg, SpeculativeMethod(), prompts)
    rows = texts(state, 64)
    assert 5 < sum(row[-1] == eos for row in rows) < 60
    return cfg, prompts, rows, np.asarray(state.tokens)
