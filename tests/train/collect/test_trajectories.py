"""Collecting a model's answers: what is stored, going on after a stop, refusals, reading."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import dlm
from decode.diffusion.loop import decode, init_state
from decode.diffusion.points import named
from dlm.presets import PRESETS
from dlm.tokenizer import word_tokenizer
from tests.lib import toys
from tests.lib.models import spread
from tests.lib.paths import ROOT
from tests.lib.weights import init_params
from train import data
from train.collect import trajectories
from train.collect.config import TrajectoryConfig
from train.collect.records import Rounds, Trajectories, open_records
from train.config import ConfigError
from train.workdir import hold

P, G, C = 5, 6, 3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A model that says all kinds of things, with the toy task's tokenizer."""
    tokenizer = word_tokenizer(toys.Copy().pieces)
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        n_kv_heads=4,
        max_seq_len=16,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("teacher") / "model"
    params = spread(init_params(jax.random.key(0), cfg))
    dlm.save(path, dlm.LanguageModel(params, cfg, tokenizer))
    return path


def settings(model_path, **changes):
    fields = dict(
        checkpoint=str(model_path),
        task={"make": "tests.lib.toys:Copy"},
        block_len=C,
        num_examples=10,
        prompt_len=P,
        gen_len=G,
        batch_size=4,
        examples_per_shard=6,
        oracle=True,
    )
    return TrajectoryConfig(**(fields | changes))


@pytest.fixture(scope="module")
def collected(model_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("collected")
    assert trajectories.run(settings(model_path), out) > 0
    return out


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*array_record*")}


@pytest.mark.exhaustive(every=4)
def test_records_are_what_the_method_decodes(collected, model_path):
    records, model, task = open_records(collected), dlm.load(model_path), toys.Copy()
    assert len(records) == 10 and "tensorflow" not in sys.modules
    prompts = [model.tokenizer.encode(task[i].prompt) for i in range(10)]
    for i, (line, record) in enumerate(zip(results(collected), records, strict=True)):
        assert line["index"] == record["index"] == i
        assert task.score(task[i], line["text"])["score"] == line["score"] == record["score"]
    method = named("one_per_step", C)
    state = decode(
        model.params, model.cfg, method, init_state(model.cfg, method, prompts, gen_len=G)
    )
    start, eos = state.prompt_len, model.cfg.eos_token_id
    ended = False
    for i in range(10):
        record = records[i]
        assert record["index"] == i and record["prompt"].tolist() == prompts[i]
        canvas, step_map = state.tokens[i, start:].tolist(), state.step_map[i].tolist()
        said = canvas[: canvas.index(eos)] if eos in canvas else canvas
        ended |= eos in canvas
        assert record["completion"].tolist() == said + [eos] * (G - len(said))
        assert record["step_map"].tolist() == step_map
        np.testing.assert_allclose(record["confidence"], state.confidence[i], rtol=1e-4)
        np.testing.assert_allclose(record["log_prob"], state.log_prob[i], rtol=1e-4, atol=1e-6)
        assert record["num_forwards"] == int(state.num_forwards[i])
        text = model.tokenizer.decode(said)
        assert record["score"] == task.score(task[i], text)["score"]
    assert ended


def test_rounds_come_to_the_answer(collected):
    """Every position of the answer is decided once, in a round in which it was right or stuck."""
    records = open_records(collected)
    for i in range(10):
        rounds = records[i]["rounds"]
        assert rounds["confidence"].shape == rounds["is_right"].shape == rounds["undecided"].shape
        assert rounds["confidence"].shape[1] == C
        assert ((rounds["confidence"] >= 0) & (rounds["confidence"] <= 1)).all()
        assert rounds["undecided"][0].all()
        assert len(rounds["confidence"]) <= G + G // C


def test_rounds_as_a_task(collected, model_path, tmp_path):
    """By example: eight of ten to learn from, one each to stop and to report."""
    records, parts = open_records(collected), ("train", "valid", "test")
    for part, indices in zip(parts, (range(8), (8,), (9,)), strict=True):
        task = Rounds(str(collected), part)
        expected = np.concatenate([records[i]["rounds"]["is_right"] for i in indices])
        assert len(task) == len(expected) > 0 and task.block_len == C
        found = np.stack([task[i].values["is_right"] for i in range(len(task))])
        np.testing.assert_array_equal(found, expected)
    assert task.model == dlm.fingerprint(dlm.load(model_path)) and task.confidence == "Probability"
    old = tmp_path / "old"
    shutil.copytree(collected, old)
    text = (old / "settings.json").read_text()
    (old / "settings.json").write_text(text.replace('"confidence"', '"sureness"'))
    with pytest.raises(ValueError, match=r"settings.json has no 'confidence': collect again"):
        Rounds(str(old))


def test_a_finished_collection_is_left_alone(collected, model_path):
    before = contents(collected)
    assert len(before) == 2
    times = {path: path.stat().st_mtime_ns for path in collected.glob("*array_record*")}
    assert trajectories.run(settings(model_path), collected) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.exhaustive
def test_kill_9_loses_the_open_shard_only(collected, model_path, tmp_path):
    """Killed at a random point, the same command comes to the same records."""
    values = dataclasses.asdict(settings(model_path, examples_per_shard=2))
    program = (
        "import json, sys; from train.collect import trajectories as t; "
        "t.run(t.TrajectoryConfig(**json.loads(sys.argv[1])), sys.argv[2])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(values), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not list(tmp_path.glob("*00001-of-00005")) and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(FileNotFoundError, match="has finished"):
        open_records(tmp_path / "nowhere")
    done = set(contents(tmp_path))
    trajectories.run(TrajectoryConfig(**values), tmp_path)
    assert len(contents(tmp_path)) == 5 and done <= set(contents(tmp_path)) | {
        name for name in done if name.endswith(".partial")
    }
    ours, theirs = open_records(tmp_path), open_records(collected)
    for i in range(10):
        # Batches of another size may round differently.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), ours[i], theirs[i])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="treshold"), "method: there is no method 'treshold'; close: threshold"),
        (dict(num_examples=513), "num_examples=513 must be in 1 to 512"),
        (dict(prompt_len=3), "the prompt of example 0 has 4 tokens, more than prompt_len=3"),
        (dict(task={"make": "tests.lib.toys:Nothing"}), "task.make="),
        (dict(checkpoint="nowhere"), "checkpoint='nowhere'"),
        (dict(changes={"rule": {"nope": 1}}), "method: rule .* has no field 'nope'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model_path, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        trajectories.run(settings(model_path, **changes), tmp_path / "out")
    with pytest.raises(ConfigError, match="batch_size=0 must be"):
        settings(model_path, batch_size=0)


def test_two_in_one_folder_are_refused(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "build", lambda *_: pytest.fail("worked"))
    with hold(tmp_path), pytest.raises(ConfigError, match="is in use by process"):
        trajectories.run(settings(model_path), tmp_path)


def test_a_folder_of_other_settings_is_refused(collected, model_path):
    before = contents(collected)
    with pytest.raises(ConfigError, match=r"another config \(gen_len was 6 and is 7\)"):
        trajectories.run(settings(model_path, gen_len=7), collected)
    assert contents(collected) == before
    trajectories.run(settings(model_path, batch_size=2), collected)  # only how fast


def test_they_are_a_task_to_train_on(collected, model_path):
    train, valid, whole = (Trajectories(str(collected), s) for s in ("train", "valid", "all"))
    assert (len(train), len(valid), len(whole)) == (9, 1, 10)
    tokenizer = dlm.load(model_path).tokenizer
    example = train[3]
    row = data.encode_example(example, tokenizer, prompt_len=6, completion_len=8)
    n = len(example.prompt)
    assert row["prompt"].tolist() == [tokenizer.pad_token_id] * (6 - n) + example.prompt.tolist()
    assert row["prompt_start"] == 6 - n
    assert row["completion"].tolist() == example.completion.tolist() + [tokenizer.eos_token_id] * 2
    assert row["step_map"].tolist() == example.step_map.tolist() + [-1, -1]
    length = int(row["completion_len"])
    assert row["completion"][length - 1] == tokenizer.eos_token_id
    assert (row["completion"][: length - 1] != tokenizer.eos_token_id).all()
    with pytest.raises(ConfigError, match="a trajectory's completion has 6 tokens, more than"):
        data.encode_example(example, tokenizer, prompt_len=6, completion_len=5)
    for tokens in ([1, -1], [1, tokenizer.vocab_size]):
        wrong = dataclasses.replace(example, prompt=np.array(tokens, np.int32))
        with pytest.raises(ConfigError, match=f"the prompt has token {tokens[1]}, which must be"):
            data.encode_example(wrong, tokenizer, prompt_len=6, completion_len=8)
    with pytest.raises(ValueError, match="split='test' must be one of train, valid, all"):
        Trajectories(str(collected), "test")
    with pytest.raises(ValueError, match="no trajectory is right"):
        Trajectories(str(collected), only_right=True)
