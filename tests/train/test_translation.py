"""The config of the translator: its data fit, its tokenizer is learned, its smoke test runs."""

import pytest

import dlm
from configs import translation
from dlm.params import num_params
from tests.lib.pairs import write_pairs
from tests.lib.paths import SHARED
from train import data, loop
from train.config import ConfigError, build, from_config_dict
from train.model import make_tokenizer, model_config

DATA = SHARED / "data" / "multi30k"


def settings_of(arg, path):
    config = translation.get_config(arg)
    config.data.task.path = str(path)
    return from_config_dict(config)


def test_settings_and_data_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"needs a value for --config\.data\.task\.path"):
        from_config_dict(translation.get_config())
    settings = settings_of("en_de", write_pairs(tmp_path))
    build(settings.train.objective, "train.objective")
    task, held_out = loop._build_tasks(settings)
    assert task[0].prompt.startswith("A man") and held_out[0].prompt.startswith("A boy")
    tokenizer = make_tokenizer(settings, task)
    assert 300 < tokenizer.vocab_size < 6144  # fewer pairs than asked for
    cfg = model_config(settings, tokenizer)
    # What the docstring's arithmetic counts.
    layers = num_params(cfg) - cfg.vocab_size * cfg.d_model
    assert 3.1e6 < layers < 3.3e6
    iterator = data.train_iterator(task, tokenizer, settings.data)
    batch = next(iterator)
    iterator.close()
    assert batch["prompt"].shape == (84, 16) and batch["completion"].shape == (84, 16)


def test_a_tokenizer_is_learned_of_texts_in_memory(tmp_path):
    settings = settings_of("runlocal", write_pairs(tmp_path))
    task, _ = loop._build_tasks(settings)
    assert make_tokenizer(settings, task).vocab_size == 300
    stream = build({"make": "dlm.tasks.countdown:Countdown"}, "data.task")
    with pytest.raises(ConfigError, match="'bpe:300' is learned from a task that has its texts"):
        make_tokenizer(settings, stream)
    config = translation.get_config("runlocal")
    config.data.task.path, config.data.tokenizer = str(tmp_path), "bpe:9"
    with pytest.raises(ConfigError, match="'bpe:9': vocab_size=9 must be at least 258"):
        make_tokenizer(from_config_dict(config), task)


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not there")
@pytest.mark.exhaustive
def test_published_pairs_fit():
    settings = settings_of("", DATA)
    for task in loop._build_tasks(settings):
        tokenizer = make_tokenizer(settings, loop._build_tasks(settings)[0])
        assert tokenizer.vocab_size == 6144
        prompts = tokenizer.num_tokens([example.prompt for example in task.loaded])
        completions = tokenizer.num_tokens([example.completion for example in task.loaded])
        assert max(prompts) <= settings.data.prompt_len
        assert max(completions) < settings.data.completion_len


@pytest.mark.slow
@pytest.mark.exhaustive
def test_smoke_test_runs(tmp_path):
    config = translation.get_config("runlocal")
    config.data.task.path = str(write_pairs(tmp_path / "data"))
    result = loop.run(config, tmp_path / "run")
    lm = dlm.load(result.model_path)
    assert result.step == 20 and lm.cfg.shifted_logits and lm.cfg.vocab_size == 300
    assert lm.tokenizer.decode(lm.tokenizer.encode("Hündin")) == "Hündin"
