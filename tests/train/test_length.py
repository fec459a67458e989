"""A head that foresees lengths: its loss by hand, its calibration, its texts and its files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from configs import length_head
from decode.search.components import ConditionalBeam
from decode.search.loop import SearchMethod
from decode.search.strategies.conditional_beam import LACKS, Length
from dlm.heads import length
from dlm.heads.length import LengthHead, log_buckets, log_within
from dlm.lm import LanguageModel
from dlm.tasks.own_texts import OwnTexts
from dlm.trainable import Learned
from scripts.own_texts import draw
from tests.lib.heads import init
from tests.lib.jitted import as_one_program
from tests.lib.models import hidden_of, markov
from tests.lib.objectives import loss_of, make_batch
from tests.lib.search import found, search
from tests.lib.speculation import random_prompts
from train import loop
from train.config import OptimConfig
from train.objectives.length import LengthLoss, _calibration_error
from train.step import init_state, train_step

HEAD = LengthHead(d_hidden=8, num_buckets=5)


def test_loss_by_hand(toy_cfg, toy_params):
    """Rows that end, one that is cut, one without a prompt; the end of a text is not foreseen."""
    batch = {name: np.array(x) for name, x in make_batch(toy_cfg).items()}
    batch["completion"][1], batch["completion_len"][1] = 3, 6  # no end
    batch["prompt_start"][2] = 5
    own = init(HEAD, toy_cfg)
    loss, metrics = loss_of(LengthLoss(), Learned(toy_params, own), toy_cfg, batch)
    text = np.concatenate([batch["prompt"], batch["completion"]], axis=1)
    hidden, tokens, low, high, P = [], [], [], [], 5
    for b in range(4):
        start, n = batch["prompt_start"][b], batch["completion_len"][b]
        states = hidden_of(toy_params, toy_cfg, text[b, start:])
        for j in range(n):
            if (b == 1 or j < n - 1) and P + j > start:
                hidden.append(states[P + j - 1 - start])
                tokens.append(text[b, P + j])
                low.append(n - 1 - j + (b == 1))
                high.append(2**30 if b == 1 else n - 1 - j)
    buckets = as_one_program(log_buckets)(
        own, np.array(hidden), toy_params["embed"][np.array(tokens)]
    )
    log_q = as_one_program(log_within)(buckets, np.int32(low), np.int32(high))
    np.testing.assert_allclose(loss, -log_q.mean(), rtol=1e-5)
    known = [i for i, x in enumerate(high) if x < 2**30]
    right = [int(np.searchsorted([2, 3, 4, 6], low[i], "right")) for i in known]
    hits = np.asarray(buckets)[known].argmax(axis=1) == right
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)


def test_calibration_by_hand():
    """Of 0.9, 0.9 and 0.55 the first and the last are right; one more does not count."""
    probs = np.array([[[0.9, 0.1], [0.9, 0.1], [0.55, 0.45], [0.6, 0.4]]], np.float32)
    error = as_one_program(_calibration_error)(
        np.log(probs), np.array([[True, False, True, False]]), np.array([[True, True, True, False]])
    )
    np.testing.assert_allclose(error, abs(1.8 - 1) + abs(0.55 - 1), rtol=1e-5)


def test_texts_are_those_that_were_drawn(tmp_path, toy_cfg, toy_params):
    """Prompts and completions with their ends, or cut; the same seeds, the same texts."""
    cfg = dataclasses.replace(toy_cfg, mask_token_id=None)
    lm = LanguageModel(toy_params, cfg)
    texts = sorted((*draw(lm, [[3, 1], [4]], 5, 2, 4),), key=lambda x: x[0])
    assert [i for i, _ in texts] == [0, 0, 1, 1]
    assert [text["prompt"] for _, text in texts] == [[3, 1], [3, 1], [4], [4]]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for _, text in texts))
    task = OwnTexts(file)
    for i, (_, text) in enumerate(texts):
        assert task[i].completion.tolist() == text["completion"]
        ended = text["completion"][-1] == cfg.eos_token_id
        assert len(text["completion"]) == 5 or ended
    file.write_text('{"prompt": [1], "completion": "text"}\n')
    with pytest.raises(ValueError, match=r"line 1: prompt and completion must be lists of token"):
        OwnTexts(file)


def test_files(tmp_path, toy_cfg, toy_params):
    lm, own = LanguageModel(toy_params, toy_cfg), init(HEAD, toy_cfg)
    HEAD.export(tmp_path, lm, own)
    head, read = length.load(tmp_path / "model", lm)
    assert head == HEAD
    jax.tree.map(np.testing.assert_array_equal, read, own)


@pytest.mark.exhaustive
def test_a_head_learns_what_a_model_will_do():
    """The futures of a Markov chain, and a search for texts of a length among its own."""
    table = np.array([[0.5, 0.3, 0.2], [0.1, 0.5, 0.4], [0.4, 0.3, 0.3]])
    params, cfg = markov(table)
    cfg = dataclasses.replace(cfg, eos_token_id=2, pad_token_id=2)
    texts = [text for _, text in draw(LanguageModel(params, cfg), [[0], [1]] * 400, 12, 1, 400)]
    rows = np.array([x["completion"] + [2] * (12 - len(x["completion"])) for x in texts], np.int32)
    batch = {
        "prompt": np.array([x["prompt"] for x in texts], np.int32),
        "prompt_start": np.zeros(len(texts), np.int32),
        "completion": rows,
        "completion_len": np.array([len(x["completion"]) for x in texts], np.int32),
    }
    optim = OptimConfig(learning_rate=3e-2, decay_steps=150)
    step = jax.jit(
        functools.partial(train_step, cfg=cfg, objective=LengthLoss(), optim=optim, trainable=HEAD)
    )
    state = init_state(init(HEAD, cfg), optim=optim)
    for _ in range(150):
        state, metrics = step(state, batch, jax.random.key(0), Learned(params))
    assert metrics["calibration_error"] < 0.05
    own = state.params
    hidden = np.stack([hidden_of(params, cfg, [0])[-1]] * 2)
    found_q = as_one_program(log_buckets)(own, hidden, params["embed"][jnp.array([0, 1])])
    for first, ours in enumerate(np.exp(found_q)):
        law, exact = np.eye(3)[first], []
        for _ in range(3):
            law = law[:2] @ table[:2]
            exact.append(law[2])
        np.testing.assert_allclose(ours[:3], exact, atol=0.07)
    method = SearchMethod(ConditionalBeam(Length(least=4, most=4, own=own), 2, 4))
    _, ours = search((cfg, params, [[0], [1]]), method, gen_len=8)
    assert (ours.num_tokens == 4).all() and (ours.score > LACKS / 2).all()
    assert all(found(ours, b)[-1] == 2 for b in range(2))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_recipe_runs(scan_target, tmp_path):
    lm = dlm.load(scan_target)
    texts = [text for _, text in draw(lm, random_prompts(lm.cfg, 8), 12, 1, 8)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts))
    config = length_head.get_config("runlocal")
    config.train.init_from = str(scan_target)
    config.data.task.path = config.data.valid.path = str(file)
    config.data.prompt_len, config.data.completion_len = 13, 12
    result = loop.run(config, tmp_path / "run")
    assert length.load(result.model_path, lm)[0].d_hidden == 256
