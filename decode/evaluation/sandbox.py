"""Programs that a model has written, run where they can do no harm.

    run_program("assert sorted([2, 1]) == [1, 2]").is_passed

A program gets a process of its own with limits on time, memory and files, an environment without
secrets and an empty directory that is gone afterwards. `decode.evaluation.sandboxed` is what runs
inside. There are three walls:

    "namespaces"     Linux, where users may make them (containers often forbid it): no network, no
                     process outside to be seen, all file systems read-only but the program's own
                     directory, which is in memory.
    "filter"         Linux on x86-64 and ARM: the kernel refuses processes, other programs and
                     sockets; threads may be.
    "interpreter"    everywhere: Python itself refuses these, foreign functions, and changes to
                     files outside of the directory.

The third alone stops what models write, not who means to break out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile

from absl import logging

_CHILD = pathlib.Path(__file__).with_name("sandboxed.py")
_PATIENCE = 4.0  # times the CPU seconds are the wall seconds: machines are busy
_MOST_SAID = 2**16  # bytes that are read of how a program ended
_SYSTEM = ("namespaces", "filter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
      cpu_s: > 0. Seconds of a core, Python's start included; four times as many of wall time.
      memory_bytes: > 0. Of addresses.
      file_bytes: > 0. Of its directory, and of each file.
    """

    cpu_s: float = 3.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**26


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      is_passed: whether it ran to its end without an exception.
      reason: "passed", "timeout", "killed", or what was raised, such as "AssertionError: ".
      walls: those that stood, see above.
    """

    is_passed: bool
    reason: str
    walls: tuple[str, ...]


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Runs Python source to its end, or to its limits.

    It is the main module of its interpreter. What it prints is lost, there is nothing to read, and
    leaving early, `sys.exit(0)` included, is not passing.

    Args:
      program: the source.
      limits: what it may use; None: `Limits()`.

    Raises:
      ValueError: a limit is not above 0.
      OSError: no process can be started.
    """
    limits = Limits() if limits is None else limits
    for name, value in dataclasses.asdict(limits).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be above 0 and finite")
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        outcome = _run(program, limits, folder)
    _warn(tuple(wall for wall in _SYSTEM if wall not in outcome.walls))
    return outcome


def _run(program: str, limits: Limits, folder: str) -> Outcome:
    """As `run_program`, in a directory."""
    secret = secrets.token_hex(16)  # a program that ends early cannot say that it passed
    told = {"program": program, "secret": secret, **dataclasses.asdict(limits)}
    reads, writes = os.pipe()
    os.set_blocking(reads, False)
    with os.fdopen(reads, "rb") as ends, tempfile.TemporaryFile() as asks:
        asks.write(json.dumps(told | {"ends": writes}).encode())
        asks.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-IB", str(_CHILD)], cwd=folder, env=_environment(folder),
                stdin=asks, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(writes,), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writes)
        is_late = False
        try:
            process.wait(_PATIENCE * limits.cpu_s)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            _end(process)
        walls, *said = (ends.read(_MOST_SAID) or b"").decode(errors="replace").splitlines() or [""]
    standing = tuple(walls.split())
    reasons = [line.removeprefix(secret) for line in said if line.startswith(secret)]
    if reasons:
        reason = json.loads(reasons[0])
        return Outcome(reason == "passed", reason, standing)
    is_late |= process.returncode in (-signal.SIGXCPU, 128 + signal.SIGXCPU)
    return Outcome(False, "timeout" if is_late else "killed", standing)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with all of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(folder: str) -> dict[str, str]:
    """All that a program sees of one; libraries that count cores start no threads."""
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LC_ALL": "C.UTF-8"} | threads


@functools.cache
def _warn(missing: tuple[str, ...]) -> None:
    """Says once what this system cannot do."""
    if missing:
        logging.warning(
            "Programs that models write run without the system's %s here, see "
            "decode.evaluation.sandbox: Python itself keeps them in.",
            " and ".join(missing),
        )
