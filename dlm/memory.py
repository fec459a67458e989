"""Memory of the host, where the host computes."""

from __future__ import annotations

import ctypes
import sys

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library keep the memory that XLA frees, if the CPU computes.

    XLA allocates a program's temporaries anew in every call. By default glibc asks the system for
    blocks of that size and gives them back, and touching fresh pages takes a tenth of a small
    model's step, and most of a round over many rows with long caches. `dlm.load` and all commands
    do this; models that are made otherwise gain by it likewise.

    Returns:
      Whether it did anything: not on accelerators, nor without glibc.
    """
    if jax.default_backend() != "cpu" or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
