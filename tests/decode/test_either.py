"""Which of the two functions decodes: by the method's name, else by the model."""

import dataclasses

import pytest

from decode.diffusion.loop import DiffusionMethod
from decode.diffusion.schedulers.fixed_blocks import FixedBlocks
from decode.either import is_diffusion
from decode.search.astar import AStar
from decode.search.loop import SearchMethod
from decode.search.strategies.beam import Beam
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from tests.lib.untrained import byte_lm

# Of an autoregressive model, of a diffusion model, of one that was trained in blocks.
EXPECTED = {
    None: (False, True, True),
    "klass": (True, True, True),
    "prompt_lookup": (False, True, False),
    "beam_4": (False, True, False),
    "a_star": (False, True, False),
    "prompt_lokup": (False, True, True),
    DiffusionMethod(FixedBlocks(4)): (True, True, True),
    SpeculativeMethod(): (False, False, False),
    SearchMethod(Beam()): (False, False, False),
    AStar(): (False, False, False),
}


@pytest.mark.parametrize("method", EXPECTED, ids=lambda m: m if isinstance(m, str) else None)
def test_who_decodes(method):
    lm = byte_lm()
    models = [
        dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, **changes))
        for changes in ({}, {"never_causal": True}, {"never_causal": True, "block_len": 4})
    ]
    assert tuple(is_diffusion(model, method) for model in models) == EXPECTED[method]
    drafted = tuple(is_diffusion(model, None, PromptLookup()) for model in models)
    assert drafted == (False, True, False)
