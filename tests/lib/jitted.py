"""What a test calls once, without a program for each of its operations."""

import functools
from collections.abc import Callable

import jax
import numpy as np


def as_one_program(op: Callable) -> Callable:
    """`op`, whose every call is one program of the arrays it is given, and not one per operation.

    A call is traced anew: what a test has patched in between is seen.
    """

    @functools.wraps(op)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}

        def run(arrays):
            args, kwargs = tree.unflatten(arrays.get(i, x) for i, x in enumerate(leaves))
            return op(*args, **kwargs)

        return jax.jit(run)(arrays)

    return call
