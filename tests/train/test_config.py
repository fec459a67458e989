import dataclasses

import ml_collections
import pytest
from ml_collections import config_dict

from dlm.tasks.scan import Scan
from tests.lib import toys
from train.config import ConfigError, build, differences, from_config_dict, to_json


def test_sections_become_frozen_dataclasses():
    settings = from_config_dict(toys.get_config())
    assert settings.data.batch_size == 8 and settings.optim.beta1 == 0.9
    assert settings.model["d_model"] == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.data.batch_size = 3
    hash(settings.optim)  # static under jit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.batch_sise": 3}, r"unknown field data\.batch_sise; data may have .*batch_size"),
        ({"extra.x": 3}, "unknown section 'extra'"),
        ({"data.batch_size": -1}, r"data\.batch_size=-1 must be a number of at least 0"),
        (
            {"data.batch_size": 0, "data.buckets": ((1, 1),)},
            r"batch_size=0 must be at least 1 with",
        ),
        ({"data.batch_size": "8"}, r"data\.batch_size='8' must be a whole number"),
        ({"data.batch_size": 8.0}, r"data\.batch_size=8.0 must be a whole number"),
        ({"train.num_steps": True}, r"train\.num_steps=True must be a whole number"),
        ({"data.packing": "no"}, r"data\.packing='no' must be True or False"),
        ({"data.seed": -1}, r"data\.seed=-1 must be in \[0, 2\^32\)"),
        ({"data.batch_size": 7, "mesh.fsdp": 2}, r"batch_size=7 must be a multiple of .* = 2"),
        ({"data.too_long": "drop"}, r"too_long='drop' must be 'refuse', 'cut' or 'leave_out'"),
        (
            {"data.too_long": "cut", "data.packing": True, "data.prompt_len": 0},
            r"too_long='cut' must be 'refuse' with data\.packing",
        ),
        ({"data.keep_apart": True}, r"keep_apart=True needs data\.packing=True"),
        ({"train.num_steps": 9, "optim.accumulate": 2}, "num_steps=9 must be a multiple"),
        ({"optim.learning_rate": float("nan")}, "learning_rate=nan"),
        ({"optim.end_factor": 1.5}, r"end_factor=1\.5 must be in \[0, 1\]"),
        ({"optim.ema_decay": 1.0}, r"ema_decay=1\.0 must be in"),
        ({"train.master_dtype": "int8"}, "master_dtype='int8'"),
    ],
)
def test_wrong_settings_say_what_is_wrong(changes, message):
    flat = toys.get_config().to_dict()
    for name, value in changes.items():
        section, field = name.split(".")
        flat.setdefault(section, {})[field] = value
    with pytest.raises(ConfigError, match=message):
        from_config_dict(ml_collections.ConfigDict(flat))


def test_missing_and_required_values_are_named():
    config = toys.get_config().to_dict()
    del config["data"]["prompt_len"]
    with pytest.raises(ConfigError, match=r"lacks the field data\.prompt_len"):
        from_config_dict(ml_collections.ConfigDict(config))
    for make in (config_dict.required_placeholder, config_dict.placeholder):
        config = toys.get_config()
        with config.unlocked():
            config.optim.learning_rate = make(float)
        with pytest.raises(ConfigError, match=r"--config\.optim\.learning_rate"):
            from_config_dict(config)
        config.optim.learning_rate = 0.5
        assert from_config_dict(config).optim.learning_rate == 0.5


def test_build():
    task = build({"make": "dlm.tasks.scan:Scan", "partition": "length"}, "data.train")
    assert task == Scan(partition="length")
    with pytest.raises(ConfigError, match=r'data\.train\.make=None must be "module:Class"'):
        build({}, "data.train")
    with pytest.raises(ConfigError, match="cannot be imported"):
        build({"make": "dlm.tasks.scan:Skan"}, "data.train")
    with pytest.raises(ConfigError, match=r"data\.train: .*partition='long'"):
        build({"make": "dlm.tasks.scan:Scan", "partition": "long"}, "data.train")
    with pytest.raises(ConfigError, match=r"data\.train: .*unexpected keyword"):
        build({"make": "dlm.tasks.scan:Scan", "nope": 1}, "data.train")


def test_differences_ignore_what_json_ignores():
    one = to_json(from_config_dict(toys.get_config()))
    config = toys.get_config()
    config.optim.learning_rate = 0.5
    two = to_json(from_config_dict(config))
    assert differences(one, one) == {}
    assert differences(one, two) == {"optim.learning_rate": (0.01, 0.5)}
