"""The programs that `compile_tpu` compiles: kernels, decoding loops, recipes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decode.diffusion.components import DualCache, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from kernels_pallas.block_diffusion_attention import block_diffusion_attention
from kernels_pallas.unembed_loss import unembed_loss
from kernels_pallas.unembed_stats import Noise, unembed_stats
from kernels_pallas.unembed_stats import tpu as stats_tpu
from kernels_pallas.unembed_stats.shapes import STATS, StatsShape
from kernels_pallas.window_attention import tpu as attention_tpu
from kernels_pallas.window_attention import window_attention
from kernels_pallas.window_attention.shapes import ATTENTION, AttentionShape
from scripts.plan import aot

OPTIONS: tuple[tuple[str, ...], ...] = ((), ("top 10", "given ids"))


def programs(devices: Any, only: Sequence[str], loops: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Kernels at real shapes, and the decoding loops of some presets, compiled.

    Args:
      devices: of the slice.
      only: texts, of which a kernel's name contains one; empty: every kernel.
      loops: presets.

    Raises:
      ValueError: no kernel's name contains a text.
    """
    one_chip = NamedSharding(make_mesh(devices=devices[:1]), PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=one_chip)
    kernels = _kernels(array)
    for part in only:
        if not any(part in name for name in kernels):
            raise ValueError(f"no kernel's name contains {part!r}; they are {', '.join(kernels)}")
    for name, (function, operands, vocab, about) in kernels.items():
        if not only or any(part in name for part in only):
            yield {"program": name} | about | aot.compile_for(function, operands, vocab=vocab)
    mesh = make_mesh(tensor=len(devices), devices=devices)
    for name in loops:
        yield {"program": f"decode: {name}", "chips": len(devices)} | _loop(name, mesh)


# A function, abstract operands, the size of the vocabulary it reads, if it does, and what a report
# says of it that the compiler does not.
Kernel = tuple[Callable[..., Any], tuple[Any, ...], int | None, dict[str, int]]


def _kernels(array: Any) -> dict[str, Kernel]:
    """All of them, by name."""
    kernels = {
        f"window_attention: {name}": _attention(shape, dtype, array)
        for name, shape, dtype in with_float32(ATTENTION)
    }
    for name, stats, dtype in with_float32(STATS):
        for options in OPTIONS:
            label = ", ".join((f"unembed_stats: {name}", *options))
            kernels[label] = _vocabulary(stats, options, dtype, array)
    return kernels | _training(array)


def recipe_mesh(name: str, devices: Any) -> Mesh:
    """The mesh that a recipe asks for; ValueError if the slice has another number of devices."""
    config = aot.recipe_config(name)
    mesh = dict(config.get("mesh", {"tensor": config.get("tensor")}))
    if math.prod(mesh.values()) != len(devices):
        raise ValueError(
            f"the slice has {len(devices)} devices and {name} is for a mesh of {mesh}: choose a "
            "slice with as many"
        )
    return make_mesh(**mesh, devices=devices)


def recipes(target: str, meshes: Mapping[str, Mesh]) -> Iterator[dict[str, Any]]:
    """Training steps, or the loops that collect trajectories, compiled.

    Args:
      target: the slice.
      meshes: by the names of recipes, such as "llada_8b_dparallel:released".
    """
    hbm = {"hbm_bytes": aot.chip_of(target).hbm_gib * 2**30}
    for name, mesh in meshes.items():
        config = aot.recipe_config(name)
        recipe = aot.training_step if "train" in config else aot.collection
        for label, report in recipe(config, aot.recipe_model(name), mesh):
            yield {"program": f"{label}: {name}", "chips": mesh.size} | report | hbm


def with_float32(named: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """All shapes in bfloat16, and the first one in float32 as well."""
    yield from ((name, shape, jnp.bfloat16) for name, shape in named.items())
    name, shape = next(iter(named.items()))
    yield f"{name}, float32", shape, jnp.float32


def _attention(shape: AttentionShape, dtype: Any, array: Any) -> Kernel:
    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H

    def attend(q: Any, k: Any, v: Any, bits: Any, window: Any, cache: Any, ranges: Any) -> Any:
        mask: Any = shape.mask if bits is None else bits
        return window_attention(
            q, k, v, mask=mask, window_range=window, cache=cache, cache_ranges=ranges, layer=1
        )

    new = array((B, T, K, H), dtype)
    operands = (
        array((B, T, N, H), dtype),
        new,
        new,
        array((B, T, -(-T // 32)), jnp.uint32) if shape.mask == "bits" else None,
        array((B, 2), jnp.int32),
        (array((2, B, K, S, H), dtype),) * 2 if S else None,
        array((B, shape.num_ranges, 2), jnp.int32) if S else None,
    )
    return (
        attend,
        operands,
        None,
        {"vmem": attention_tpu.plan(T, S, N, K, H, dtype.dtype.itemsize).vmem_bytes},
    )


def _vocabulary(shape: StatsShape, options: tuple[str, ...], dtype: Any, array: Any) -> Kernel:
    M, D, V = shape.M, shape.D, shape.V

    def stats(hidden: Any, head: Any, banned: Any, noise: Any, given: Any) -> Any:
        k = 10 if "top 10" in options else 0
        return unembed_stats(hidden, head, banned_ids=banned, noise=noise, k=k, given_ids=given)

    operands = (
        array((M, D), dtype),
        array((V, D), dtype),
        array((2,), jnp.int32),
        Noise(array((M, 2), jnp.uint32), array((), jnp.float32)) if shape.has_noise else None,
        array((M, 3), jnp.int32) if "given ids" in options else None,
    )
    return stats, operands, V, {"vmem": stats_tpu.plan(M, D, V, dtype.dtype.itemsize).vmem_bytes}


def _training(array: Any) -> dict[str, Kernel]:
    """Forward and backward of what only training uses, at the shapes of one LLaDA-8B row."""

    def attention(q: Any, k: Any, v: Any) -> Any:
        return block_diffusion_attention(q, k, v, block_len=32).astype(jnp.float32).sum()

    def loss(hidden: Any, head: Any, targets: Any) -> Any:
        stats = unembed_loss(hidden, head, targets)
        return (stats.entropy - stats.log_prob).sum()

    L, N, H = 2048, 32, 128
    D, V = STATS["llada_8b block"].D, STATS["llada_8b block"].V
    heads = array((1, 2 * L, N, H), jnp.bfloat16)
    rows = (array((L, D), jnp.bfloat16), array((V, D), jnp.bfloat16), array((L,), jnp.int32))
    return {
        "training: block_diffusion_attention": (
            jax.grad(attention, argnums=(0, 1, 2)),
            (heads,) * 3,
            V,
            {},
        ),
        "training: unembed_loss": (jax.grad(loss, argnums=(0, 1)), rows, V, {}),
    }


def _loop(name: str, mesh: Mesh) -> dict[str, Any]:
    """Threshold decoding with the dual cache: 256 new tokens in blocks of 32 after 3,840."""
    method = DiffusionMethod(FixedBlocks(32), cache=DualCache(), rule=Threshold(0.9))
    return aot.decoding(method, PRESETS[name], mesh, batch_size=1, gen_len=256, prompt_len=3840)
