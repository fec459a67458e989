"""The project's commands, as a user types them."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tests.lib.paths import ROOT

LIBTPU = pathlib.Path(sys.prefix, "libtpu")  # where `make` puts it


needs_libtpu = pytest.mark.skipif(
    not (LIBTPU / "libtpu").is_dir() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make test installs it on Linux x86-64",
)


def run(*arguments: str, ok: bool = True) -> str:
    """What `python -m ...` prints; if it should fail, its errors too."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + (done.stderr if not ok else "")
