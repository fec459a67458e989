"""The process that a command runs in."""

from __future__ import annotations

import os

import jax
from absl import app, logging

from dlm.compilation import SWITCH, keep_programs
from dlm.memory import keep_freed_memory

STOPPED = 75  # exit code of a run that was told to stop and has saved: start it again


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
