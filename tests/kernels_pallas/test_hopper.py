"""What the Mosaic GPU kernels share, and all of them compiled for Hopper."""

import importlib
import os
import re
import subprocess
import sys

import jax
import pytest

from kernels_pallas import hopper
from tests.lib.kernels import needs_mosaic_gpu


@pytest.mark.parametrize("capability", ["9.0", "8.0", "10.0"])
def test_only_hopper_is_offered_the_kernels(monkeypatch, capability):
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert (hopper.refusal() is None) == (capability == "9.0")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "jax >= 0.11" in hopper.refusal()


COMPILE = """
import functools
import sys
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tests.kernels_pallas.unembed_stats import test_gpu as stats
from tests.kernels_pallas.window_attention import test_gpu as attention

CHIP = '''gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"'''
chip = topologies.get_topology_desc("h100", "cuda", target_config=CHIP, topology="1x1x1")
sharding = SingleDeviceSharding(chip.devices[0])


def compile(f, arguments):
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    arguments = jax.tree.map(place, arguments)
    jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


for name in ("llada_8b block", "llama3_8b tree", "llada_8b canvas", "qwen2_5_0_5b token, batch 8"):
    shape = attention.ATTENTION[name]
    attend = functools.partial(attention.attend, shape)
    compile(attend, attention.attention_arguments(shape))
for name in ("llama3_8b token", "llama3_8b tree"):
    shape = attention.ATTENTION[name]
    compile(functools.partial(attention.attend_near, shape), attention.near_arguments(shape))
for name in ("llada_8b block", "llada_8b block, sampled", "llada_8b block, batch 8"):
    compile(stats.judge, stats.stats_arguments(stats.STATS[name]))
"""


@needs_mosaic_gpu
@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_one():
    """Down to machine code, if JAX's CUDA plugin and the assembler are installed."""
    try:
        importlib.import_module("jax_plugins.xla_cuda13")
        [toolkit] = importlib.import_module("nvidia.cu13").__path__
    except ImportError:
        pytest.skip("needs the packages jax-cuda13-plugin and nvidia-cuda-nvcc")
    result = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "PATH": f"{toolkit}/bin{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-3000:]
    spills = re.findall(r"stack frame, (\d+) bytes spill stores", report)
    assert len(spills) == 9
    assert max(map(int, spills[:8])) == 0
    assert int(spills[8]) < 100  # 128 rows per warpgroup leave few registers for the statistics
    assert "serialized" not in report  # the assembler's word for wgmma that cannot overlap
