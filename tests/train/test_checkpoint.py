import dataclasses
import errno
import json

import grain
import jax
import numpy as np
import pytest

from dlm.config import ModelConfig
from dlm.tokenizer import word_tokenizer
from tests.lib import toys
from train import checkpoint, workdir
from train.config import ConfigError, from_config_dict

GENERATION = {"temperature": 0.6, "top_p": 0.9, "stop": ("a", "b")}


def write(folder, config):
    settings = from_config_dict(config)
    cfg = ModelConfig(
        **settings.model, vocab_size=9, mask_token_id=8, eos_token_id=7, pad_token_id=7
    )
    checkpoint.write_settings(folder, settings, cfg, word_tokenizer("abcdef>"), GENERATION)
    return cfg


def test_folder_says_what_the_run_was(tmp_path):
    cfg = write(tmp_path, toys.get_config())
    read_cfg, tokenizer, generation = checkpoint.read_model(tmp_path)
    assert read_cfg == cfg and generation == GENERATION
    assert tokenizer.encode("fa>") == [5, 0, 6] and tokenizer.mask_token_id == 8
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["jax"] == jax.__version__ and "git_revision" in versions
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["optim"]["learning_rate"] == 0.01 and settings["optim"]["beta1"] == 0.9


def test_other_configs_are_refused_with_all_differences(tmp_path):
    write(tmp_path, toys.get_config())
    config = toys.get_config()
    config.optim.learning_rate = 0.5
    config.data.task.length = 4
    with pytest.raises(ConfigError) as error:
        checkpoint.check_same_run(tmp_path, from_config_dict(config), 3)
    assert "data.task.length was 3 and is 4; optim.learning_rate was 0.01 and is 0.5" in str(
        error.value
    )
    assert "\n" not in str(error.value)


def test_runs_of_versions_that_lacked_a_setting_go_on(tmp_path):
    """With what it is by default, and with nothing else."""
    write(tmp_path, toys.get_config())
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    for section, name in (("data", "plain"), ("data", "buckets"), ("train", "with_mask")):
        del settings[section][name]
    file.write_text(json.dumps(settings))
    config = toys.get_config()
    checkpoint.check_same_run(tmp_path, from_config_dict(config), 3)
    config.data.plain = True
    with pytest.raises(ConfigError, match=r"\(data\.plain was False and is True\)"):
        checkpoint.check_same_run(tmp_path, from_config_dict(config), 3)


def test_what_may_change(tmp_path):
    write(tmp_path, toys.get_config())
    config = toys.get_config()
    config.train.num_steps = 100
    config.train.eval_every = 7
    config.log.every = 9
    config.checkpoint.keep = 5
    config.mesh.data = 2
    checkpoint.check_same_run(tmp_path, from_config_dict(config), 3)
    config.train.num_steps = 2
    with pytest.raises(ConfigError, match=r"num_steps=2 must be at least 3"):
        checkpoint.check_same_run(tmp_path, from_config_dict(config), 3)


def cut_off(path):
    """As a process leaves a file that it was killed over."""
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def test_files_that_were_cut_off_are_told_in_one_sentence(tmp_path):
    write(tmp_path, toys.get_config())
    settings = from_config_dict(toys.get_config())
    facts = {"num_examples": 3, "sha256": "ab"}
    checkpoint.write_data(tmp_path, facts)
    checkpoint.write_frozen(tmp_path, "cd")
    checkpoint.write_exported(tmp_path, 4)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    readers = {
        "config.json": [
            lambda: checkpoint.check_is_run(tmp_path),
            lambda: checkpoint.check_same_run(tmp_path, settings, 3),
        ],
        "model.json": [lambda: checkpoint.read_model(tmp_path)],
        "data.json": [lambda: checkpoint.check_same_data(tmp_path, facts)],
        "frozen.json": [lambda: checkpoint.check_same_frozen(tmp_path, "cd")],
        "exported.json": [lambda: checkpoint.exported_step(tmp_path)],
    }
    for name, reads in readers.items():
        for read in reads:
            read()
        cut_off(tmp_path / name)
        for read in reads:
            with pytest.raises(ConfigError, match=rf"{name} is not valid JSON .*: it is damaged"):
                read()
    for text, message in (("{}", "does not say what the model is"), ('{"x": 1}', "does not say")):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"model\.json {message}"):
            checkpoint.read_model(tmp_path)
    write(tmp_path, toys.get_config())
    cut_off(tmp_path / "tokenizer" / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"the tokenizer of this run is damaged: .*tokenizer"):
        checkpoint.read_model(tmp_path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.json is missing"):
        checkpoint.read_model(tmp_path)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    workdir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert workdir.read_json(path) == {"a": 1}


def test_another_frozen_model_is_refused(tmp_path):
    checkpoint.check_same_frozen(tmp_path, "ab")  # it is not known what there was
    checkpoint.write_frozen(tmp_path, "ab")
    checkpoint.check_same_frozen(tmp_path, "ab")
    with pytest.raises(ConfigError, match=r"fingerprint ab, and now cd\): .*frozen\.json to go on"):
        checkpoint.check_same_frozen(tmp_path, "cd")


def test_checkpoints_without_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        checkpoint.check_same_run(tmp_path, from_config_dict(toys.get_config()), 3)


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert checkpoint._git_revision() is None


class FakeIterator(grain.DatasetIterator):
    """Counts, and has a state to be saved."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __next__(self):
        self.count += 1
        return self.count

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def test_places_of_another_number_of_processes(tmp_path, monkeypatch):
    state, iterator = {"x": jax.numpy.arange(3.0)}, FakeIterator()
    config = from_config_dict(toys.get_config()).checkpoint
    with checkpoint.open_manager(tmp_path, config) as manager:
        iterator.count = 10
        checkpoint.save(manager, 1, state, iterator)
        manager.wait_until_finished()
        (place,) = manager.directory.glob("1/data/process*")
        place.rename(place.with_name("process_2-of-4.json"))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        fresh = FakeIterator()
        checkpoint.restore(manager, 1, abstract, fresh)
        assert fresh.count == 10
        with pytest.raises(ConfigError, match=r"saved by 4 processes, .* not by 1"):
            checkpoint.restore(manager, 1, abstract, fresh, is_packed=True)


def test_a_step_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    config = from_config_dict(toys.get_config()).checkpoint

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    with checkpoint.open_manager(tmp_path, config) as manager:
        state, iterator = {"x": jax.numpy.arange(3.0)}, FakeIterator()
        checkpoint.save(manager, 1, state, iterator)
        checkpoint.wait(manager)
        monkeypatch.setattr(FakeIterator, "get_state", full)
        with pytest.raises(OSError, match=r"cannot be saved in .*start the same .*No space left"):
            checkpoint.save(manager, 2, state, iterator)
            checkpoint.wait(manager)
    assert checkpoint.latest_step(tmp_path) == 1


def test_save_and_restore(tmp_path):
    state = {"x": jax.numpy.arange(3.0), "step": jax.numpy.int32(7)}
    config = from_config_dict(toys.get_config()).checkpoint
    iterator = FakeIterator()
    with checkpoint.open_manager(tmp_path, dataclasses.replace(config, keep=2)) as manager:
        assert manager.latest_step() is None
        for step in (1, 2, 3):
            iterator.count = 10 * step
            checkpoint.save(manager, step, {**state, "x": state["x"] + step}, iterator)
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [2, 3]
    # Half a checkpoint, as a killed process leaves it, is neither used nor kept.
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
    fresh = FakeIterator()
    with checkpoint.open_manager(tmp_path, config) as manager:
        assert manager.latest_step() == 3
        restored = checkpoint.restore(manager, 3, jax.eval_shape(lambda: state), fresh)
    assert fresh.count == 30
    np.testing.assert_array_equal(restored["x"], np.arange(3.0) + 3)
    assert not (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").exists()
