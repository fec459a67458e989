"""Processes of this machine that are one cluster of JAX."""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import time
from typing import IO

from train.host import STOPPED

POLL_S = 0.2
GRACE_S = 60  # between SIGTERM and SIGKILL


def environments(num: int, address: str) -> list[dict[str, str]]:
    """What tells each process who it is, see `train.host.join_cluster`."""
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(num),
            "JAX_PROCESS_ID": str(i),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        }
        for i in range(num)
    ]


def free_address() -> str:
    """A port of this machine that nobody uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def run_once(command: list[str], num: int, log_dir: pathlib.Path) -> tuple[int, bool]:
    """Runs all processes to their end.

    Each is in a session of its own, so that a Ctrl-C reaches it once: from here; and so does the
    end of the terminal.

    Returns:
      The first exit code that is not 0, and whether this process was told to end them.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []
    told: list[int] = []

    def end(signum: int) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    def pass_on(signum: int, _: object) -> None:
        told.append(signum)
        end(signum)

    previous = {
        s: signal.signal(s, pass_on)
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(s) != signal.SIG_IGN  # as `nohup` has it
    }
    try:
        for i, own in enumerate(environments(num, free_address())):
            log = None if i == 0 else (log_dir / f"process_{i}.log").open("wb")
            logs += [] if log is None else [log]
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | own, stdout=log, stderr=log, start_new_session=True
                )
            )
        deadline = failed = None
        while any(process.poll() is None for process in processes):
            codes = [process.poll() for process in processes]
            if deadline is None and (bad := [c for c in codes if c not in (None, 0, STOPPED)]):
                failed = bad[0]
                end(signal.SIGTERM)
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                end(signal.SIGKILL)
            time.sleep(POLL_S)
    finally:
        end(signal.SIGKILL)
        for s, handler in previous.items():
            signal.signal(s, handler)
        for file in logs:
            file.close()
    ends = [process.wait() for process in processes]
    bad = [code for code in ends if code not in (0, STOPPED)]
    return failed or (bad[0] if bad else max(ends)), bool(told)
