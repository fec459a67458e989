"""A compiler setting for NVIDIA GPUs, made when `dlm` is first imported.

Layers are stacked, and a forward scans over them. XLA's Triton matrix products cannot read one
layer of a stack in place: each layer's weights are copied first, which makes a forward of few
tokens half as fast (measured with `scripts.bench decode` and `spec`, see docs/kernels.md). cuBLAS
can. So Triton's are turned off for this process, unless its XLA_FLAGS speak of them.
"""

import os
from collections.abc import MutableMapping
from importlib import metadata

FLAG = "xla_gpu_enable_triton_gemm"


def prefer_cublas(environ: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flag to XLA_FLAGS where JAX has a CUDA plugin; without effect once a GPU was used.

    Args:
      environ: whose XLA_FLAGS are extended.
    """
    flags = environ.get("XLA_FLAGS", "")
    plugins = metadata.entry_points(group="jax_plugins")
    if FLAG not in flags and any("cuda" in plugin.name for plugin in plugins):
        environ["XLA_FLAGS"] = f"{flags} --{FLAG}=false".strip()
