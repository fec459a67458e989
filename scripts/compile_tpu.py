"""Compiles the kernels and whole decoding loops for TPUs, on a machine that has none.

    python -m scripts.compile_tpu --target=v5e:2x2

libtpu's compiler needs no TPU: `pip install libtpu` (the version that `pip install 'jax[tpu]'`
would take). Every program is compiled for real shapes and one JSON line is printed for it: seconds
to compile, bytes of arguments, temporaries and donated (aliased) buffers per chip, how many Pallas
kernels it calls, the VMEM their tiles take, and `full_logits`: shapes of any array that spans the
vocabulary other than the embedding and the head, of which there should be none.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

# Before JAX starts: no search for a TPU that is not there.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decode.diffusion import DiffusionMethod, decode, init_state
from decode.rules import DualCache, FixedBlocks, Threshold
from dlm.config import PRESETS
from dlm.params import abstract_params
from dlm.sharding import logical_sharding, make_mesh
from kernels_pallas import unembed_stats_tpu, window_attention_tpu
from kernels_pallas.unembed_stats import Noise, unembed_stats
from kernels_pallas.window_attention import window_attention

_TARGET = flags.DEFINE_string("target", "v5e:2x2", "slice to compile for, e.g. v6e:2x2, v5p:2x2x1")
_LOOPS = flags.DEFINE_list("loops", ["llada_8b", "dream_7b"], "models whose loop is compiled")

# name: B, T, S, N, K, H, mask
ATTENTION = {
    "llada_8b block": (1, 32, 4096, 32, 32, 128, "full"),
    "llada_8b canvas": (1, 4096, 0, 32, 32, 128, "full"),
    "dream_7b block, batch 8": (8, 32, 4096, 28, 4, 128, "full"),
    "llama3_8b tree, batch 4": (4, 64, 8192, 32, 8, 128, "tree"),
    "llama3_8b token, batch 16": (16, 1, 8192, 32, 8, 128, "causal"),
    "qwen2_5_0_5b block, float32": (2, 24, 1000, 14, 2, 64, "full"),
}
# name: M, D, V, options
VOCABULARY = {
    "llada_8b block": (32, 4096, 126464, ()),
    "dream_7b block, sampled": (64, 3584, 152064, ("noise",)),
    "llama3_8b tree, top 10": (256, 4096, 128256, ("top",)),
    "qwen2_5_0_5b given ids, float32": (40, 896, 151936, ("noise", "given")),
}


def main(argv: list[str]) -> None:
    del argv
    try:
        topology = topologies.get_topology_desc(_TARGET.value, platform="tpu")
    except Exception as error:
        raise SystemExit(
            f"--target={_TARGET.value} cannot be compiled for here: {error}. "
            "It needs libtpu (Linux x86-64, pip install libtpu) and a slice such as v5e:2x2"
        ) from error
    for program in programs(topology.devices):
        print(json.dumps({"target": _TARGET.value, **program}), flush=True)


def programs(devices: Any) -> Iterator[dict[str, Any]]:
    one_chip = NamedSharding(make_mesh(devices=devices[:1]), PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=one_chip)
    for name, shape in ATTENTION.items():
        dtype = jnp.float32 if "float32" in name else jnp.bfloat16
        function, operands, vmem = _attention(*shape, dtype, array)
        yield {"program": f"window_attention: {name}", "vmem": vmem} | _compile(function, operands)
    for name, (M, D, V, options) in VOCABULARY.items():
        dtype = jnp.float32 if "float32" in name else jnp.bfloat16
        function, operands, vmem = _vocabulary(M, D, V, options, dtype, array)
        compiled = _compile(function, operands, vocab=V)
        yield {"program": f"unembed_stats: {name}", "vmem": vmem} | compiled
    mesh = make_mesh(tensor=len(devices), devices=devices)
    for name in _LOOPS.value:
        yield {"program": f"decode: {name}", "chips": len(devices)} | _loop(name, mesh)


def _attention(
    B: int, T: int, S: int, N: int, K: int, H: int, mask: str, dtype: Any, array: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    def attend(q: Any, k: Any, v: Any, bits: Any, window: Any, cache: Any, ranges: Any) -> Any:
        chosen: Any = mask if bits is None else bits
        return window_attention(
            q,
            k,
            v,
            mask=chosen,
            window_range=window,
            cache=cache,
            cache_ranges=ranges,
            layer=1,
        )[0]

    new = array((B, T, K, H), dtype)
    cache = (array((2, B, K, S, H), dtype),) * 2 if S else None
    bits = array((B, T, -(-T // 32)), jnp.uint32) if mask == "tree" else None
    ranges = array((B, 2, 2), jnp.int32) if S else None
    window = array((B, 2), jnp.int32)
    tiles = window_attention_tpu.plan(T, S, N, K, H, jnp.dtype(dtype).itemsize)
    operands = (array((B, T, N, H), dtype), new, new, bits, window, cache, ranges)
    return attend, operands, tiles.vmem_bytes


def _vocabulary(
    M: int, D: int, V: int, options: tuple[str, ...], dtype: Any, array: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    def stats(hidden: Any, head: Any, banned: Any, noise: Any, given: Any) -> Any:
        k = 10 if "top" in options else 0
        return unembed_stats(hidden, head, banned_ids=banned, noise=noise, k=k, given_ids=given)

    noise = Noise(array((M, 2), jnp.uint32), array((), jnp.float32))
    operands = (
        array((M, D), dtype),
        array((V, D), dtype),
        array((2,), jnp.int32),
        noise if "noise" in options else None,
        array((M, 3), jnp.int32) if "given" in options else None,
    )
    return stats, operands, unembed_stats_tpu.plan(M, D, V, jnp.dtype(dtype).itemsize).vmem_bytes


def _loop(name: str, mesh: Mesh) -> dict[str, Any]:
    """Threshold decoding with the dual cache: 256 new tokens in blocks of 32 after 3,840."""
    cfg = PRESETS[name]
    method = DiffusionMethod(FixedBlocks(32), cache=DualCache(), rule=Threshold(0.9))

    def place(x: Any) -> jax.ShapeDtypeStruct:
        axes = (None, "batch", "kv_heads", None, None) if x.ndim == 5 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=logical_sharding(x.shape, axes, mesh)
        )

    with jax.set_mesh(mesh):
        make = functools.partial(init_state, cfg, method, [[0]], gen_len=256, prompt_len=3840)
        state = jax.tree.map(place, jax.eval_shape(make))
        cache_bytes = sum(
            x.dtype.itemsize * x.size for x in jax.tree.leaves(state.cache) if x.ndim == 5
        )
        compiled = _compile(
            lambda params, state: decode(params, cfg, method, state),
            (abstract_params(cfg, mesh), state),
            vocab=cfg.vocab_size,
            donate=(1,),
        )
    return compiled | {"cache_bytes_per_chip": cache_bytes // mesh.size}


def _compile(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    vocab: int | None = None,
    donate: tuple[int, ...] = (),
) -> dict[str, Any]:
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate).trace(*operands)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "compile_s": round(time.perf_counter() - start, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "pallas_calls": text.count('custom_call_target="tpu_custom_call"'),
        "full_logits": [] if vocab is None else _spanning(text, vocab),
    }


def _spanning(program: str, vocab: int) -> list[str]:
    """Shapes in a compiled program whose last dimension is (a chip's share of) the vocabulary."""
    shares = {vocab // n for n in (1, 2, 4, 8) if vocab % n == 0}
    shapes = set(re.findall(r"\b(?:f32|bf16)\[[\d,]+\]", program))
    return sorted(s for s in shapes if int(re.split(r"[\[,\]]", s)[-2]) in shares)


if __name__ == "__main__":
    app.run(main)
