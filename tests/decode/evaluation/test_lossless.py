"""Where a text with drafts parts from the one without."""

import dataclasses

import jax
import numpy as np
import pytest

import decode.evaluation.lossless as lossless
import dlm
from decode.complete import complete
from decode.evaluation.lossless import Parting, lossless_report
from decode.speculative.drafters.prompt_lookup import PromptLookup
from tests.lib.speculation import random_prompts


@pytest.mark.exhaustive(every=4)
def test_no_difference_is_none_and_the_first_one_has_its_margin(toy_cfg, toy_params, monkeypatch):
    lm = dlm.LanguageModel(toy_params, toy_cfg)
    prompts = random_prompts(toy_cfg, 3, seed=4)
    assert lossless_report(lm, prompts, PromptLookup(), gen_len=8) == [None] * 3
    assert lossless_report(lm, prompts[0], PromptLookup(), gen_len=8) == [None]  # one of them
    asked = []
    monkeypatch.setattr(lossless, "complete", lambda lm, some, **_: asked.append(some) or [])
    assert lossless_report(lm, "a text", PromptLookup()) == [] and asked == [["a text"]] * 2
    monkeypatch.undo()

    plain = complete(lm, prompts, gen_len=8, top_logprobs=2)

    def otherwise(lm, prompts, **options):
        """As `complete`, but with drafts one token of the second text is another."""
        answers = complete(lm, prompts, **options)
        if "drafter" in options:
            canvas = answers[1].canvas.copy()
            canvas[2] = (canvas[2] + 1) % 20
            answers[1] = dataclasses.replace(answers[1], canvas=canvas)
        return answers

    monkeypatch.setattr(lossless, "complete", otherwise)
    first, second, third = lossless_report(lm, prompts, PromptLookup(), gen_len=8)
    assert first is third is None
    token = int(plain[1].canvas[2])
    best = np.asarray(jax.device_get(plain[1].top.log_probs))[2]
    assert second == Parting(2, token, (token + 1) % 20, float(best[0] - best[1]))
