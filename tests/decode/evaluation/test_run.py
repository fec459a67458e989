"""Both loops run one way: as `generate` and `complete`, with one program per structure."""

import dataclasses

import numpy as np
import pytest

import dlm
from decode.complete import complete
from decode.diffusion.components import Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.run import answered, timed
from decode.generate import generate
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.loop import SpeculativeMethod
from dlm.compilation import Compiling

PROMPTS = [[5, 6, 7, 5, 6], [8], [9, 5, 6, 7]]
GEN_LEN = 8


@pytest.fixture(scope="module")
def lm(toy_cfg, toy_params):
    return dlm.LanguageModel(toy_params, toy_cfg)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.canvas, b.canvas)
        assert (a.num_forwards, a.finish_reason) == (b.num_forwards, b.finish_reason)


def test_a_diffusion_method(lm):
    programs = {}
    method = DiffusionMethod(rule=Threshold(0.9))
    whole = timed(lm, method, PROMPTS, gen_len=GEN_LEN, programs=programs)
    same(whole.completions, generate(lm, PROMPTS, block_len=32, gen_len=GEN_LEN, stopper="filled"))
    assert int(whole.state.num_steps) == max(c.num_forwards for c in whole.completions)
    assert whole.seconds > 0 and whole.compile_s > 0 and len(programs) == 1

    other = method.replace(rule=Threshold(0.5))  # data, and so the same program
    again = timed(lm, other, PROMPTS, gen_len=GEN_LEN, programs=programs)
    assert again.compile_s == whole.compile_s and len(programs) == 1


@pytest.mark.exhaustive(every=4)
def test_more_prompts_than_rows_of_a_speculative_method(lm):
    causal = dataclasses.replace(lm, cfg=dataclasses.replace(lm.cfg, mask_token_id=None))
    method = SpeculativeMethod(PromptLookup(2))
    done = answered(causal, method, PROMPTS, gen_len=GEN_LEN, batch_size=2)
    same(done.completions, complete(causal, PROMPTS, drafter=PromptLookup(2), gen_len=GEN_LEN))
    forwards = [completion.num_forwards for completion in done.completions]
    assert max(forwards) <= done.rounds <= sum(forwards)
    assert done.seconds > 0 and done.compile_s > 0
    with Compiling() as compiling:
        again = answered(causal, method, PROMPTS * 2, gen_len=GEN_LEN, batch_size=2)
    same(again.completions, done.completions * 2)
    assert again.compile_s < 0.2 * done.compile_s and compiling.num == 0
    one = answered(causal, method, PROMPTS, gen_len=GEN_LEN)  # as many rows as there are prompts
    same(one.completions, done.completions)
    assert one.rounds == max(forwards)


def test_what_makes_no_sense_is_refused_before_it_compiles(lm):
    with pytest.raises(ValueError, match="max_seq_len"):
        timed(lm, DiffusionMethod(), PROMPTS, gen_len=10**6)
    with pytest.raises(ValueError, match="max_seq_len"):
        answered(lm, DiffusionMethod(), PROMPTS, gen_len=10**6)
