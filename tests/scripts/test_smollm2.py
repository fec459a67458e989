"""SmolLM2's drafters: what they learn from, and that their recipes fit."""

import itertools
import json
import math
import os
import types

import jax
import pytest

from configs import smollm2 as configs
from configs import smollm2_blocks
from decode import complete
from dlm.params import ParamSpec
from dlm.presets import PRESETS
from scripts.smollm2 import answers, training
from scripts.smollm2.drafters import everything, trained
from scripts.smollm2.make import config_of
from tests.lib.mains import run_main
from tests.lib.untrained import char_lm
from train.config import build, from_config_dict


@pytest.mark.parametrize("name", configs.RECIPES)
def test_recipes_fit_the_model(name, tmp_path):
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "vocab.json").write_text(json.dumps([*range(configs.NUM_IDS)]))
    settings = from_config_dict(config_of(name, tmp_path))
    objective = build(settings.train.objective, "train.objective")
    trainable = build(settings.train.trainable, "train.trainable")
    assert objective.refuse(trainable) is None
    if name != "draft":  # which is cut from the installed model
        assert trainable.specs(PRESETS["smollm2_135m"])


@pytest.mark.parametrize(("block_len", "schedule"), [("4", ()), ("8", (4,))])
def test_blocks_fit_the_model(block_len, schedule):
    settings = from_config_dict(smollm2_blocks.get_config(block_len))
    objective = build(settings.train.objective, "train.objective")
    assert (objective.block_len, objective.schedule) == (int(block_len), schedule)
    adapter = build(settings.train.trainable, "train.trainable").specs(PRESETS["smollm2_135m"])
    numbers = sum(
        math.prod(spec.shape)
        for spec in jax.tree.leaves(adapter, is_leaf=lambda x: isinstance(x, ParamSpec))
    )
    assert 2 * numbers < 12e6  # bytes, in bfloat16


@pytest.mark.exhaustive(every=4)
def test_answers_are_made_once_and_are_what_the_model_says(tmp_path, monkeypatch):
    for name, records in (
        ("mbpp", [{"text": "add two", "test_list": ["add a and b"]}]),
        ("gsm8k", [{"question": f"how many are {word}"} for word in ("a", "b", "c", "d")]),
    ):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "train.jsonl").write_text(lines)
    for name, value in dict(GEN_LEN=8, NUM_VALID=1, PROMPT_LEN=80, BEFORE_TEST=" ").items():
        monkeypatch.setattr(answers, name, value)
    monkeypatch.setattr(answers, "invent", lambda lm, num, batch_size: ["<user>what is this"] * num)
    lm, out = char_lm(), tmp_path / "answers"
    for _ in range(2):
        answers.make_answers(lm, str(tmp_path), out, 4, batch_size=2)
        monkeypatch.setattr(answers, "invent", None)  # nothing is made up again
    train, valid = (
        [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "valid")
    )
    assert len(train) == 3 and len(valid) == 1
    told = "".join(record["prompt"] for record in train + valid)
    assert all(word in told for word in ("add two", "add a and b", "are a", "what is this"))
    for record in train:
        expected = complete.complete(lm, record["prompt"], gen_len=8)
        assert record["completion"] == expected.text
    with pytest.raises(ValueError, match=r"prompts\.jsonl has 4 prompts, not --num_answers=5"):
        answers.make_answers(lm, "", out, 5, batch_size=2)
    said = {"text": expected.text, "finish_reason": "length"}
    assert answers._is_whole(lm, said) and not answers._is_whole(lm, said | {"text": "ab"})
    assert answers._is_whole(lm, {"text": "ab", "finish_reason": "eos"})
    assert not answers._is_whole(lm, {"text": "", "finish_reason": "eos"})


def test_turns_are_made_up_until_there_are_enough_that_end(monkeypatch):
    said = iter(["one two three four", "too short", "one two three four", "cut off in the mid"] * 9)

    def as_finished(lm, prompts, **options):
        assert all(prompt.endswith("<user>") for prompt in prompts)
        for i, _ in enumerate(prompts):
            text = next(said)
            reason = "length" if text.startswith("cut") else "eos"
            yield i, types.SimpleNamespace(text=text, finish_reason=reason)

    monkeypatch.setattr(complete, "as_finished", as_finished)
    assert answers.invent(char_lm(), 1, 4) == ["<user>one two three four<assistant>"]
    with pytest.raises(ValueError, match="has made up 1 of 2 prompts"):
        answers.invent(char_lm(), 2, 4)
    several = iter([f"one two three {word}" for word in ("a", "b", "c")] + ["x" * 192] * 99)
    said = itertools.chain.from_iterable(zip(["too short"] * 30, several, strict=False))
    monkeypatch.setattr(answers, "MOST_TRIES", 2)  # the last of which suffices
    assert len(answers.invent(char_lm(), 3, 4)) == 3


def test_training_is_shown_as_it_went(tmp_path):
    """Of finished runs the validations, and the minutes from the first file to the model."""
    for name in ("medusa", "masks", "draft"):
        run = tmp_path / name
        (run / "model").mkdir(parents=True)
        lines = [{"step": 20, "loss": 2.0}]
        lines += [{"step": n, training.ACCEPTANCE: 1 + n / 100} for n in (40, 60)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for file, time in (("config.json", 1_000), ("exported.json", 1_600)):
            (run / file).touch()
            os.utime(run / file, (time, time))
    (tmp_path / "draft" / "model").rmdir()  # is being trained
    lines = training.table(tmp_path).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        [f"`{name}`", "60", "10", "1.40 / 1.60"] for name in ("medusa", "masks")
    ]
    training.draw(training.curves(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_what_is_wrong_is_said(tmp_path):
    assert list(trained(None, tmp_path)) == []
    assert [name for name, _ in everything(None, tmp_path)] == ["early exits"]
    for step, flag in (("answers", "data"), ("measure", "prompts")):
        said = run_main("scripts.smollm2", f"--steps=train,{step}", f"--workdir={tmp_path}", code=1)
        assert f"error: --{flag} is missing, which --steps={step} reads" in said
    said = run_main("scripts.smollm2", "--steps=cook", code=1)
    assert "error: --steps has 'cook', which must be one of answers, train, measure" in said
    with pytest.raises(ValueError, match="config argument 'eagle_9' must be one of draft, medusa"):
        configs.get_config("eagle_9")
