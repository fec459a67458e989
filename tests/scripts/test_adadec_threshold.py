"""The threshold of AdaDec: what is observed of texts, what is learned of it, and the command."""

import json
import re

import numpy as np
import pytest

import dlm
from decode.complete import complete
from dlm.lm import LanguageModel
from scripts.adadec_threshold.learn import learn, observe
from tests.lib.mains import run_main
from tests.lib.models import laws_of
from tests.lib.untrained import char_lm


@pytest.mark.parametrize("slope", [-4.0, -8.0])
@pytest.mark.parametrize("theta", [0.7, 1.3])
def test_a_known_threshold_is_found(slope, theta):
    """Of 20000 tokens within 5 percent, though right guesses are many times as many."""
    rng = np.random.default_rng(1)
    entropy = rng.exponential(0.5, 20_000)
    is_right = rng.random(20_000) < 1 / (1 + np.exp(-slope * (entropy - theta)))
    found = learn(entropy, is_right)
    assert abs(found.theta / theta - 1) < 0.05 and is_right.mean() > 0.6
    assert abs(found.slope / slope - 1) < 0.1
    told = (entropy < found.theta) == is_right
    assert abs(found.accuracy - told.mean()) < 0.02


def test_a_curve_by_hand():
    """Everything below 1 is right, nothing above: cuts in between tell all apart."""
    entropy = np.linspace(0, 2, 400)
    found = learn(entropy, entropy < 1)
    assert found.accuracy == 1 and abs(found.theta - 1) < 0.05


def test_nothing_to_learn_is_refused():
    entropy = np.linspace(0, 1, 50)
    with pytest.raises(ValueError, match="of 40 tokens 40 are right and 0 are not"):
        learn(entropy, np.ones(50, bool))
    with pytest.raises(ValueError, match=r"slope=.* must be negative"):
        learn(entropy, entropy > 0.5)


def test_what_is_observed_by_hand(toy_cfg, toy_params):
    """Every token of an answer, whatever stands beside it in a batch."""
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 20, n).tolist(), rng.integers(0, 20, m).tolist())
        for n, m in ((3, 5), (1, 1), (9, 12))
    ]
    entropy, is_right = observe(LanguageModel(toy_params, toy_cfg), pairs, batch_size=2)
    expected, right = [], []
    for prompt, answer in pairs:
        laws = laws_of(toy_params, toy_cfg, prompt + answer)[len(prompt) - 1 : -1]
        expected += (-(laws * np.log(laws)).sum(axis=1)).tolist()
        right += (laws.argmax(axis=1) == answer).tolist()
    np.testing.assert_allclose(entropy, expected, atol=1e-4)
    assert is_right.tolist() == right
    with pytest.raises(ValueError, match="pair 0 has 0 and 1 tokens, which must be at least 1"):
        observe(LanguageModel(toy_params, toy_cfg), [([], [3])])


@pytest.mark.exhaustive
def test_the_command(tmp_path):
    """Of a model's own samples: where it is sure, its best guess is mostly what was drawn."""
    lm = char_lm()
    dlm.save(tmp_path / "model", lm)
    prompts = [f"{a}{b}" for a in "abcdef" for b in "ghijkl"]
    drawn = complete(lm, prompts, gen_len=40, temperature=1.0)
    lines = [{"q": q, "a": f"{x.text}."} for q, x in zip(prompts, drawn, strict=True)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    options = f"--checkpoint={tmp_path / 'model'}", f"--texts={tmp_path / 'texts.jsonl'}"
    said = run_main("scripts.adadec_threshold", *options, "--prompt={q}", "--answer={a}")
    assert re.search(r"theta [.\d]+ nats, of \d+ tokens in 36 texts", said)
    assert re.search(r"sigmoid\(-[.\d]+ H \+ [.\d]+\)", said) and "pauses at " in said
    said = run_main("scripts.adadec_threshold", *options, code=1)
    assert "texts.jsonl, line 1: the record lacks the field" in said
