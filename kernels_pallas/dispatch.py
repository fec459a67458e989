"""Which implementation of an operation runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

_PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}  # our name, and the platform it is lowered for

Kernels = dict[str, tuple[Callable[..., Any], str | None]]


def choose(
    operation: str,
    implementation: str | None,
    *,
    xla: Callable[..., Any],
    reference: Callable[..., Any],
    kernels: Kernels,
) -> Callable[..., Any]:
    """The function that does `operation`; all of them take the same operands.

    Args:
      operation: its name, for messages.
      implementation: "xla", "reference" or a name in `kernels`; None: the kernel of the platform
        the program is compiled for, if it can serve this call, else `xla`.
      xla: runs anywhere.
      reference: the contract spelled out.
      kernels: per accelerator ("tpu", "gpu") the kernel, and why it cannot serve this call, in
        words, or None if it can.

    Raises:
      NotImplementedError: if the named implementation does not exist, or cannot run here.
    """
    if implementation == "xla":
        return xla
    if implementation == "reference":
        return reference
    if implementation is None:
        offered = {
            _PLATFORMS[name]: kernel for name, (kernel, why_not) in kernels.items() if not why_not
        }
        if not offered:
            return xla
        return functools.partial(jax.lax.platform_dependent, default=xla, **offered)
    if implementation not in kernels:
        names = ", ".join(f"'{name}'" for name in ("xla", *kernels))
        raise NotImplementedError(
            f"implementation={implementation!r} of {operation} does not exist; "
            f"use None, {names} or 'reference'"
        )
    kernel, why_not = kernels[implementation]
    if jax.default_backend() != implementation:
        why_not = (
            f"it needs a {implementation.upper()} and the default backend is "
            f"{jax.default_backend()}"
        )
    if why_not:
        raise NotImplementedError(
            f"implementation={implementation!r} of {operation} cannot run: {why_not}"
        )
    return kernel
