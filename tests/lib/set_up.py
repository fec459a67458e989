"""Before JAX starts: CPU, eight fake devices, programs that are cheap and shared."""

import gc
import importlib.metadata
import os
import shutil
import tempfile

# Traces are millions of objects that live as long as their module: to look for garbage among them
# as often as Python does takes a twelfth of a run.
gc.set_threshold(200_000, 20, 100)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda pytest -m gpu: on a GPU
flags = [
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_parallel_codegen_split_count=1",  # the other core has another worker
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")  # half the time to compile; gone in 0.12
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])
# What one worker of a run has compiled, the others and their subprocesses need not.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    os.environ["REMOVE_COMPILATION_CACHE_OF"] = str(os.getpid())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def remove_cache() -> None:
    """At the end of a run: the process that made its compilation cache removes it."""
    if os.environ.get("REMOVE_COMPILATION_CACHE_OF") == str(os.getpid()):
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
