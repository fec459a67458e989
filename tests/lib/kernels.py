"""Interpreters that kernels are tested in, and lowering them where no accelerator is."""

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

INTERPRET = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)

needs_mosaic_gpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)


def interpret_gpu():
    """Races raise, and memory that was not written is NaN."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    return plgpu.force_gpu_interpret_mode(params)


def lower_for_cuda(f, *arguments):
    """The program's text."""
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
