"""The folder of whatever `train` makes: whether it can be written to, and whose it is.

A run and a data set of trajectories each keep their settings in a file of their folder.
The same command goes on there; another one is refused in one sentence.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from train.config import ConfigError, differences


def check_writable(workdir: pathlib.Path) -> None:
    """Makes the folder if needed.

    Raises:
      ConfigError: it cannot be made or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r} cannot be written to ({error.strerror}); choose a folder "
            "that can"
        ) from error


def check_same(
    path: pathlib.Path, settings: Mapping[str, Any], holds: str, may_change: Sequence[str] = ()
) -> None:
    """Makes sure that a folder was made with the same settings.

    Args:
      path: the file that has those it was made with, as JSON.
      settings: those of now, as JSON reads them back.
      holds: what is in the folder, such as "checkpoints".
      may_change: fields, or sections, that may differ.

    Raises:
      ConfigError: others differ; the message has them all, as they were and as they are.
    """
    old = json.loads(path.read_text(encoding="utf-8"))
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
    """Writes a file that people may read, too."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
