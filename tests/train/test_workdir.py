"""Folders that cannot be used, and folders of something else."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from train import workdir
from train.config import ConfigError


def test_unwritable_workdir_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/nowhere")):
        with pytest.raises(ConfigError, match="cannot be written to") as error:
            workdir.open_folder(bad)
        assert "\n" not in str(error.value)
    assert workdir.open_folder(str(tmp_path / "new" / "folder")) == tmp_path / "new" / "folder"
    assert not any((tmp_path / "new" / "folder").iterdir())


def test_addresses_are_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="workdir='gs://bucket/x' is an address, not a folder"):
        workdir.open_folder("gs://bucket/x")
    assert not any(tmp_path.iterdir())


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


# ---- Who is in it -----------------------------------------------------------------------------


def leave_lock(folder, age_s=0.0, **content):
    """As another process would have left it, so many seconds ago."""
    path = folder / workdir.LOCK
    path.write_text(json.dumps(content) if content else "")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_one_at_a_time(tmp_path):
    with workdir.hold(tmp_path):
        held = json.loads((tmp_path / workdir.LOCK).read_text())
        assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
        with (
            pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on") as error,
            workdir.hold(tmp_path),
        ):
            pytest.fail("both are in")
        assert f"delete {tmp_path / workdir.LOCK}" in str(error.value)
        assert json.loads((tmp_path / workdir.LOCK).read_text()) == held
    assert not (tmp_path / workdir.LOCK).exists()
    with pytest.raises(KeyError), workdir.hold(tmp_path):
        raise KeyError
    assert not (tmp_path / workdir.LOCK).exists()


@pytest.mark.parametrize("left_by", ["a process that ended", "a zombie", "an earlier process"])
def test_what_a_killed_process_left_is_taken_over(tmp_path, left_by):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid, started = process.pid, workdir._started(process.pid)
    content = {"host": socket.gethostname(), "pid": pid, "started": started}
    leave_lock(tmp_path, age_s=1e6, **content)
    with pytest.raises(ConfigError, match=f"process {pid} on"), workdir.hold(tmp_path):
        pytest.fail("it still runs")
    if left_by == "an earlier process":  # of the same number
        leave_lock(tmp_path, **{**content, "started": "1"})
    else:
        process.stdin.close()
        deadline = time.monotonic() + 20
        while workdir._started(pid) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    if left_by == "a process that ended":
        process.wait()
    with workdir.hold(tmp_path):
        assert json.loads((tmp_path / workdir.LOCK).read_text())["pid"] == os.getpid()
    process.kill()
    process.communicate()


@pytest.mark.parametrize("content", [{"host": "elsewhere", "pid": 1, "started": "1"}, {}])
def test_on_another_host_silence_tells(tmp_path, content):
    path = leave_lock(tmp_path, age_s=workdir.STALE_S - 20, **content)
    with pytest.raises(ConfigError, match="in use by process"), workdir.hold(tmp_path):
        pytest.fail("it may still run")
    leave_lock(tmp_path, age_s=workdir.STALE_S + 20, **content)
    with workdir.hold(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "BEAT_S", 0.01)
    with workdir.hold(tmp_path):
        path = tmp_path / workdir.LOCK
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime < time.time() - 60:
            assert time.monotonic() < deadline
            time.sleep(0.005)
