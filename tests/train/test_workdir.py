"""Folders that cannot be used, and folders of something else."""

import json
import pathlib

import pytest

from train import workdir
from train.config import ConfigError


def test_unwritable_workdir_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/nowhere")):
        with pytest.raises(ConfigError, match="cannot be written to") as error:
            workdir.check_writable(bad)
        assert "\n" not in str(error.value)
    workdir.check_writable(tmp_path / "new" / "folder")
    assert not any((tmp_path / "new" / "folder").iterdir())


def test_all_that_differs_is_named(tmp_path):
    old = {"optim": {"beta1": 0.9, "eps": 1.0}, "log": {"every": 3}, "seed": 1}
    path = tmp_path / "config.json"
    workdir.write_json(path, old)
    assert json.loads(path.read_text()) == old
    new = {"optim": {"beta1": 0.5, "eps": 1.0}, "log": {"every": 5}, "seed": 2}
    with pytest.raises(ConfigError) as error:
        workdir.check_same(path, new, "a filter", may_change=("log",))
    assert str(error.value) == (
        f"the folder {str(tmp_path)!r} has a filter of another config (optim.beta1 was 0.9 and is "
        "0.5; seed was 1 and is 2): go back to the old values or choose another folder"
    )
    workdir.check_same(path, {**old, "log": {"every": 5}}, "a filter", may_change=("log",))


def test_a_run_that_has_gone_further_is_refused(tmp_path):
    workdir.check_not_beyond(tmp_path, "num_steps", 8, 8)
    with pytest.raises(ConfigError, match=r"num_steps=4 must be at least 8, the steps that"):
        workdir.check_not_beyond(tmp_path, "num_steps", 4, 8)
