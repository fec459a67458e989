"""The folder of whatever `train` makes: whether it can be written to, and whose it is.

A run and a data set of trajectories each keep their settings in a file of their folder.
The same command goes on there; another one is refused in one sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from dlm import json_lines, written
from train.config import ConfigError, differences

LOCK = "lock.json"
BEAT_S = 20.0  # how often whoever is in a folder says so
STALE_S = 180.0  # without a sign for so long, another host's process is taken to be gone


def open_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """A folder of a run, made if needed.

    Raises:
      ConfigError: it is an address, or cannot be made or written to.
    """
    if "://" in str(path):
        raise ConfigError(
            f"workdir={str(path)!r} is an address, not a folder: mount it on every host (a bucket "
            "with gcsfuse), and give where it is mounted"
        )
    workdir = pathlib.Path(path).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r} cannot be written to ({error.strerror}); choose a folder "
            "that can"
        ) from error
    return workdir


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps others out of a folder.

    Its lock.json names the process and is touched every `BEAT_S`, also on file systems that several
    hosts share. What a killed process left is taken over: on its own host at once, on another one
    `STALE_S` after the last touch. (Two that take over in the same instant may both succeed.)

    Raises:
      ConfigError: another process is in the folder.
    """
    path = workdir / LOCK
    pid = os.getpid()
    own = {"host": socket.gethostname(), "pid": pid, "started": _started(pid)}
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(own, file)
            break
        except FileExistsError:
            _check_abandoned(path)
            path.unlink(missing_ok=True)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _check_abandoned(path: pathlib.Path) -> None:
    """Raises ConfigError unless whoever made a lock is gone."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent) as probe:  # the file system's clock
            age_s = pathlib.Path(probe.name).stat().st_mtime - path.stat().st_mtime
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return  # it has just left
    try:
        host, pid, started = (json.loads(text)[name] for name in ("host", "pid", "started"))
    except (ValueError, KeyError, TypeError):  # it has just come, or died as it did
        host, pid, started = "an unknown host", "unknown", None
    if host == socket.gethostname() and isinstance(pid, int):
        is_gone = _started(pid) is None or _started(pid) != started
    else:
        is_gone = age_s > STALE_S
    if not is_gone:
        raise ConfigError(
            f"workdir={str(path.parent)!r} is in use by process {pid} on {host}, last seen "
            f"{max(0, age_s):.0f} s ago: wait for its end or choose another folder; if it is gone, "
            f"delete {path}"
        )
    logging.warning("Process %s on %s, which used %s, is gone.", pid, host, path.parent)


def _started(pid: int) -> str | None:
    """When a process of this host started, in its own units; None: there is none."""
    try:
        after_name = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if pathlib.Path("/proc/self/stat").exists():
            return None
    else:
        return None if after_name[0] in "ZX" else after_name[19]
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def check_same(
    path: pathlib.Path,
    settings: Mapping[str, Any],
    holds: str,
    may_change: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Makes sure that a folder was made with the same settings.

    Args:
      path: the file that has those it was made with, as JSON.
      settings: those of now, as JSON reads them back.
      holds: what is in the folder, such as "checkpoints".
      may_change: fields, or sections, that may differ.
      defaults: sections of values that fields have which the file does not know: a later version
        has added them.

    Raises:
      ConfigError: others differ; the message has them all, as they were and as they are.
    """
    old = read_json(path)
    for section, values in (defaults or {}).items():
        if isinstance(old.get(section), dict):
            old[section] = {**values, **old[section]}
    changed = [
        f"{name} was {before!r} and is {now!r}"
        for name, (before, now) in differences(old, settings).items()
        if not any(name == known or name.startswith(f"{known}.") for known in may_change)
    ]
    if changed:
        raise ConfigError(
            f"the folder {str(path.parent)!r} has {holds} of another config "
            f"({'; '.join(changed)}): go back to the old values or choose another folder"
        )


def check_not_beyond(workdir: pathlib.Path, field: str, num_steps: int, step: int) -> None:
    """Raises ConfigError if a run of `num_steps`, which `field` says, has gone further already."""
    if step > num_steps:
        raise ConfigError(
            f"{field}={num_steps} must be at least {step}, the steps that "
            f"workdir={str(workdir)!r} has already done"
        )


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file that people may read, too: whole, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    written.write_json(partial, value)
    partial.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
      ConfigError: something else is there.
    """
    try:
        return json_lines.read_json(path)
    except ValueError as error:
        raise ConfigError(
            f"{error}: it is damaged, so put back what was there, or choose another folder"
        ) from error
