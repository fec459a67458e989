"""The process that a command runs in."""

from __future__ import annotations

import ctypes
import os
import sys

import jax
from absl import app, logging

from dlm.compilation import SWITCH, keep_programs

STOPPED = 75  # exit code of a run that was told to stop and has saved: start it again
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def only_flags(argv: list[str]) -> None:
    """Refuses arguments of a command that are no flags.

    Raises:
      app.UsageError: there is one.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")


def set_up_command(argv: list[str]) -> None:
    """What commands do first that say themselves what they do: no arguments, quiet libraries."""
    only_flags(argv)
    logging.set_verbosity(logging.WARNING)
    set_up_process()


def set_up_process() -> None:
    """What commands do before they compute: memory that is freed and programs are kept."""
    keep_freed_memory()
    try:
        keep_programs()
    except OSError as error:
        logging.warning("Compiled programs are not kept (%s): %s=/some/folder", error, SWITCH)


def keep_freed_memory() -> bool:
    """Makes the C library keep the memory that XLA frees, if the CPU computes.

    XLA allocates a program's temporaries anew in every call. By default glibc asks the system for
    blocks of that size and gives them back, and touching fresh pages takes a tenth of a small
    model's step or more.

    Returns:
      Whether it did anything: not on accelerators, nor without glibc.
    """
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def join_cluster() -> None:
    """Joins the cluster that JAX finds, if any: before any other JAX call.

    JAX knows TPU pods, Slurm, Kubernetes and Open MPI. Elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say it (`scripts.launch.local`).
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None  # noqa: E731
    num_processes, process_id = number("JAX_NUM_PROCESSES"), number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(num_processes=num_processes, process_id=process_id)
    except ValueError:
        if num_processes is not None:  # a cluster was named, and cannot be joined
            raise
        logging.info("No cluster found: running as a single process.")
