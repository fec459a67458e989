"""Every file in configs/: its settings are sound, its data fits, and its smoke test runs."""

import importlib
import pathlib

import ml_collections
import pytest

import dlm
from dlm.tokenizer import word_tokenizer
from train import data, loop
from train.config import build, from_config_dict

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*_*.py") if path.stem[0] != "_")


def get_config(name: str, arg: str = "") -> ml_collections.ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_data_fit(name):
    settings = from_config_dict(get_config(name))
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


@pytest.mark.parametrize("name", NAMES)
def test_unknown_variants_are_refused(name):
    with pytest.raises(ValueError, match="config argument 'nope' must be"):
        get_config(name, "nope")


# The example of `train.loop.run` is the smoke test of mdlm_scan.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mdlm_scan"])
def test_smoke_test_runs(name, tmp_path):
    result = loop.run(get_config(name, "runlocal"), tmp_path)
    assert result.step == 20 and dlm.load(result.model_path).tokenizer is not None
