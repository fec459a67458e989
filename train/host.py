"""The process that training runs in."""

from __future__ import annotations

import ctypes
import sys

import jax
from absl import logging

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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
    """Joins the cluster that JAX finds, if any: before any other JAX call."""
    try:
        jax.distributed.initialize()
    except ValueError:
        logging.info("No cluster found: running as a single process.")
