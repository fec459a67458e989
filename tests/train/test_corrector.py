"""The config of the corrector: its data fit, and its smoke test runs."""

import pytest

import dlm
from configs import corrector
from dlm.tokenizer import byte_tokenizer
from train import data, loop
from train.config import ConfigError, build, from_config_dict

TEXT = " ".join(
    f"The {a} man looked at the {b} house, and went home to the {c} {d}."
    for a in ("old", "young", "tall", "small") for b in ("white", "dark")
    for c in ("fire", "table") for d in ("before the evening", "with a friend")
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(TEXT)
    return str(folder)


def test_settings_and_data_fit(texts):
    config = corrector.get_config()
    with pytest.raises(ConfigError, match=r"needs a value for --config\.data\.task\.path"):
        from_config_dict(config)
    config.data.task.path = texts
    settings = from_config_dict(config)
    build(settings.train.objective, "train.objective")
    task, valid_task = loop._build_tasks(settings)
    assert {task[i].completion for i in range(50)}.isdisjoint(
        valid_task[i].completion for i in range(50)
    )
    tokenizer = byte_tokenizer()
    for i in range(300):
        data.encode_example(
            task[i], tokenizer, settings.data.prompt_len, settings.data.completion_len
        )
    iterator = data.train_iterator(task, tokenizer, settings.data)
    batch = next(iterator)
    iterator.close()
    assert batch["completion"].shape[1] in (64, 96, 129)
    with pytest.raises(ValueError, match="config argument 'nope' must be"):
        corrector.get_config("nope")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_smoke_test_runs(texts, tmp_path):
    config = corrector.get_config("runlocal")
    config.data.task.path = texts
    result = loop.run(config, tmp_path)
    assert result.step == 20 and dlm.load(result.model_path).cfg.shifted_logits
