"""What the Mosaic GPU kernels share: where they can run, and how they lay out matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

NUM_SMS = 132  # multiprocessors of an H100 SXM and of an H200
SMEM_BUDGET = 220 * 2**10  # bytes of shared memory; a block may have 227 KiB

load: Any = plgpu.load  # its signature changes between versions of JAX


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices that wgmma reads: rows in pieces of 128 bytes, swizzled."""
    lanes = 128 // jnp.dtype(dtype).itemsize
    transforms = plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def refusal() -> str | None:
    """Why Hopper kernels cannot run or be lowered here, in words; None if they can.

    Where the default backend is no GPU there is none to ask: then a program that is lowered for
    CUDA is taken to be meant for Hopper.
    """
    if jax.__version_info__ < (0, 11):
        return f"it needs jax >= 0.11 and this is {jax.__version__}"
    if jax.default_backend() == "gpu":
        capability = str(jax.devices()[0].compute_capability)
        if not capability.startswith("9."):
            return f"it needs a Hopper GPU (compute capability 9.0) and this one has {capability}"
    return None
