"""What rounds cost is measured once, and told from what a drafter's forwards do."""

import json

import numpy as np
import pytest

from decode.complete import complete
from decode.speculative import costs
from decode.speculative.components import PromptLookup
from decode.speculative.controller import Controller
from decode.speculative.loop import decode
from dlm.lm import LanguageModel
from tests.lib.speculation import random_prompts


def test_what_forwards_cost_is_told_from_rounds():
    """By hand: two forwards take 10, three were made where more was judged."""
    seconds, forwards = np.array([20.0, 30.0, 38.0]), np.array([0, 2, 3])
    assert costs.without_forwards(seconds, forwards).tolist() == [20, 20, 23, 5, 2]
    none = np.zeros(3, int)
    assert costs.without_forwards(seconds, none).tolist() == [*seconds, 0, 0]
    faster = np.array([20.0, 19.0, 18.0])  # by chance
    assert costs.without_forwards(faster, forwards).tolist() == [20, 19, 18, 0, 2]


@pytest.mark.exhaustive(every=4)
def test_costs_are_measured_once_and_kept(plain, toy_params, tmp_path, monkeypatch):
    """By `complete`, for batches that stay full; a second process reads the file."""
    cfg, _, _, _ = plain
    lm, prompts = LanguageModel(toy_params, cfg), random_prompts(cfg, 5)
    monkeypatch.setattr(costs, "_file", lambda: tmp_path / costs.FILE)
    monkeypatch.setattr(costs, "_measured", {})
    calls = []
    measure = costs.measure
    monkeypatch.setattr(costs, "measure", lambda *a: calls.append(0) or measure(*a))
    options = {"drafter": PromptLookup(3), "gen_len": 8, "batch_size": 2}
    compiled = decode._cache_size()
    answers = complete(lm, prompts, controller=Controller(), **options)
    assert len(calls) == 1 and decode._cache_size() == compiled + 1
    plain_answers = complete(lm, prompts, gen_len=8, batch_size=2)
    for a, b in zip(answers, plain_answers, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist() and b.rounds_by_width is None
        assert list(a.rounds_by_width) == [0, 1, 4]
        assert sum(a.rounds_by_width.values()) == a.num_forwards
    (found,) = json.loads((tmp_path / costs.FILE).read_text()).values()
    assert len(found) == 5 and min(found[:3]) > 0 and found[3:] == [0, 0]
    monkeypatch.setattr(costs, "_measured", {})
    complete(lm, prompts, controller=Controller(), **options)
    assert len(calls) == 1
    complete(lm, prompts, controller=Controller(prior=0.9), **options)
    assert len(calls) == 1 and decode._cache_size() == compiled + 2  # and plain decoding
    monkeypatch.setattr(costs, "_measured", {})
    monkeypatch.setattr(costs, "_sources", lambda: "of another version")
    complete(lm, prompts, controller=Controller(), **options)
    assert len(calls) == 2
