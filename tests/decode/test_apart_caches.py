"""Caches that lie apart decode what stacked ones do, in every loop, in rows that are replaced."""

import numpy as np
import pytest

import dlm
from decode import generate
from decode.core.texts import Asked
from decode.diffusion.components import BlockCausal, DelayedCache, DualCache, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.speculative import answers as drafted
from decode.speculative.drafters.eagle import Eagle
from decode.speculative.drafters.hydra import Hydra
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.loop import SpeculativeMethod
from dlm.cache import init_cache
from dlm.params import Apart
from tests.lib.tiers import more

DIFFUSION = {
    "dual": (FixedBlocks(4), DualCache()),
    "delayed": (FixedBlocks(4), DelayedCache()),
    "block causal": (FixedBlocks(4, aligned=True), BlockCausal(4)),
}
DRAFTERS = {"recycling": TokenRecycling, "hydra": Hydra, "eagle": Eagle}


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "name", ["hydra", "dual", *more("recycling", "eagle", "delayed", "block causal")]
)
def test_texts_are_the_same(toy_cfg, toy_params, monkeypatch, name):
    if name in DIFFUSION:
        method, loop = DiffusionMethod(*DIFFUSION[name], rule=Threshold(0.5)), generate.LOOP
    else:
        drafter = DRAFTERS[name].example(toy_cfg, toy_params)
        method, loop = SpeculativeMethod(drafter), drafted.LOOP
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 20, n).tolist() for n in (3, 7, 1, 5)]
    asked = Asked(dlm.LanguageModel(toy_params, toy_cfg), prompts, [8] * 4, [*range(4)])
    found = []
    for least in (0, 2**30):
        monkeypatch.setattr("dlm.cache.APART_BYTES", least)
        assert isinstance(init_cache(toy_cfg, 2, 8).k, Apart) == (least == 0)
        answers = asked.answers(loop, method, 2, progress=False)
        found.append([(a.canvas.tolist(), a.step_map.tolist()) for a in answers])
    assert found[0] == found[1]
