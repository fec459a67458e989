"""Every file in configs/: its settings are sound, its data fits, and its smoke test runs."""

import importlib
import math

import ml_collections
import pytest

import dlm
from dlm.tokenizer import byte_tokenizer, word_tokenizer
from tests.lib.paths import ROOT
from tests.lib.tiers import more
from train import data, loop
from train.config import ConfigError, build, from_config_dict

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*_*.py") if path.stem[0] != "_")
FROM_FILES = ("llada_8b_sft", "pretrain_jsonl", "sft_jsonl")  # that the user gives
ELSEWHERE = (  # have tests of their own
    *("llada_8b_dparallel", "llada_8b_learn2pd"),
    *("collect_trajectories", "distill_d3llm", "distill_dparallel", "filter_learn2pd"),
    *("causal_lm", "distill_draft", "draft_heads", "layer_skip", "smollm2", "smollm2_blocks"),
    *("length_head", "stop_head"),
)
EXAMPLE = ROOT / "configs" / "example.jsonl"


def get_config(name: str, arg: str = "") -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    ("name", "arg"),
    [
        *((name, "") for name in NAMES if name not in FROM_FILES + ELSEWHERE),
        *(("causal_puzzles", arg) for arg in ("countdown", "game24")),
    ],
)
def test_settings_and_data_fit(name, arg):
    settings = from_config_dict(get_config(name, arg))
    build(settings.train.objective, "train.objective")
    for task in loop._build_tasks(settings):
        tokenizer = word_tokenizer(task.pieces)
        lengths = []  # of prompts; an odd stride meets every operation
        for i in range(0, len(task), len(task) // 1000 | 1):
            row = data.encode_example(
                task[i], tokenizer, settings.data.prompt_len, settings.data.completion_len
            )
            lengths.append(settings.data.prompt_len - row["prompt_start"])
        # Not much is wasted on padding.
        assert settings.data.prompt_len - max(lengths) <= 2


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("name", FROM_FILES)
def test_settings_for_files(name):
    config = get_config(name)
    with pytest.raises(ConfigError, match=r"needs a value for --config\.data\.task\.path"):
        from_config_dict(config)
    config.data.task.path = config.data.valid.path = str(EXAMPLE)
    config.data.task.completion = "{answer}"
    if config.train.init_from is None:
        with pytest.raises(ConfigError, match=r"needs a value for --config\.train\.init_from"):
            from_config_dict(config)
        config.train.init_from = "model"
    settings = from_config_dict(config)
    build(settings.train.objective, "train.objective")
    task, valid_task = loop._build_tasks(settings)
    assert len(task) == len(valid_task) == 36
    iterator = data.train_iterator(task, byte_tokenizer(), settings.data)
    batch = next(iterator)
    iterator.close()
    # These texts are short: the smallest bucket is the first that is full.
    largest = (settings.data.prompt_len, settings.data.completion_len)
    shape = min(*settings.data.buckets, largest, largest)
    assert (batch["prompt"].shape[1], batch["completion"].shape[1]) == shape


@pytest.mark.parametrize("name", NAMES)
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match="config argument 'nope' must be"):
        get_config(name, "nope")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_fine_tuning_starts_from_a_pre_trained_model(tmp_path):
    before = loop.run(get_config("pretrain_jsonl", "runlocal"), tmp_path / "before")
    config = get_config("sft_jsonl", "runlocal")
    config.train.init_from = str(before.model_path)
    after = loop.run(config, tmp_path / "after")
    assert before.step == after.step == 20
    assert dlm.load(after.model_path).cfg == dlm.load(before.model_path).cfg
    for metrics in (before.metrics, after.metrics):
        assert 0 < metrics["valid/nll_bound"] < 6
        bound = math.exp(metrics["valid/nll_bound"])
        assert metrics["valid/perplexity_bound"] == pytest.approx(bound, rel=1e-5)


# The example of `train.loop.run` is the smoke test of mdlm_scan.
@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize(
    "name",
    [
        "llada_8b_sft",
        *more(
            *(
                name
                for name in NAMES
                if name not in ("mdlm_scan", "llada_8b_sft", "pretrain_jsonl", *ELSEWHERE)
            )
        ),
    ],
)
def test_smoke_test_runs(name, tmp_path):
    result = loop.run(get_config(name, "runlocal"), tmp_path)
    assert result.step == 20 and dlm.load(result.model_path).tokenizer is not None
