"""Compiles kernels, whole decoding loops and training steps for TPUs, on a machine that has none.

    python -m scripts.compile_tpu --target=v5e:2x2
    python -m scripts.compile_tpu --target=v5e:2x4 --recipes=llada_8b_dparallel
    python -m scripts.compile_tpu --target=v5e:2x2 --recipes=llada_8b_learn2pd

libtpu's compiler needs no TPU: `pip install libtpu` (the version that `pip install 'jax[tpu]'`
would take). Every program is compiled for real shapes and one JSON line is printed for it: seconds
to compile, bytes of arguments, temporaries and donated (aliased) buffers per chip, how many Pallas
kernels it calls, the VMEM their tiles take, and `full_logits`: shapes of any array that spans the
vocabulary other than the embedding and the head, of which there should be none.

`--recipes` compiles the training step of those configs instead, or the decoding loops of those that
collect trajectories, on the mesh they ask for.

Every line says `needed_bytes` of each device (arguments, temporaries, and results that are not
written over arguments), to be compared with `hbm_bytes`; `largest`, the largest arrays that the
program holds or streams; and `loop_flops`, operations as the compiler counts them: the body of a
loop once, kernels not at all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

# Before JAX starts: no search for a TPU that is not there.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from decode.diffusion import DiffusionMethod, decode, init_state
from decode.methods import named, override
from decode.rules import DualCache, FixedBlocks, Threshold
from dlm.config import PRESETS, ModelConfig
from dlm.params import abstract_params
from dlm.sharding import logical_sharding, make_mesh
from kernels_pallas import shapes, unembed_stats_tpu, window_attention_tpu
from kernels_pallas.block_diffusion_attention import block_diffusion_attention
from kernels_pallas.shapes import AttentionShape, StatsShape
from kernels_pallas.unembed_loss import unembed_loss
from kernels_pallas.unembed_stats import Noise, unembed_stats
from kernels_pallas.window_attention import window_attention
from train import train_state
from train.config import OptimConfig, build
from train.trajectories import knowing

_TARGET = flags.DEFINE_string("target", "v5e:2x2", "slice to compile for, e.g. v6e:2x2, v5p:2x2x1")
_LOOPS = flags.DEFINE_list("loops", ["llada_8b", "dream_7b"], "models whose loop is compiled")
_RECIPES = flags.DEFINE_list(
    "recipes", [], "configs whose training step is compiled instead, e.g. llada_8b_sft"
)
# Of a device, which is a chip; on v4 and tpu7x it is half a chip.
HBM_GIB = {"v4": 16, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
OPTIONS: tuple[tuple[str, ...], ...] = ((), ("top 10", "given ids"))


def main(argv: list[str]) -> None:
    del argv
    try:
        topology = topologies.get_topology_desc(_TARGET.value, platform="tpu")
    except Exception as error:
        raise SystemExit(
            f"--target={_TARGET.value} cannot be compiled for here: {error}. "
            "It needs libtpu (Linux x86-64, pip install libtpu) and a slice such as v5e:2x2"
        ) from error
    named = recipes if _RECIPES.value else programs
    for program in named(topology.devices):
        print(json.dumps({"target": _TARGET.value, **program}), flush=True)


def programs(devices: Any) -> Iterator[dict[str, Any]]:
    one_chip = NamedSharding(make_mesh(devices=devices[:1]), PartitionSpec())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=one_chip)
    for name, shape, dtype in with_float32(shapes.ATTENTION):
        function, operands, vmem = _attention(shape, dtype, array)
        yield {"program": f"window_attention: {name}", "vmem": vmem} | _compile(function, operands)
    for name, stats, dtype in with_float32(shapes.STATS):
        for options in OPTIONS:
            function, operands, vmem = _vocabulary(stats, options, dtype, array)
            label = ", ".join((name, *options))
            compiled = _compile(function, operands, vocab=stats.V)
            yield {"program": f"unembed_stats: {label}", "vmem": vmem} | compiled
    for name, (function, operands) in _training(array).items():
        vocab = shapes.STATS["llada_8b block"].V
        yield {"program": f"training: {name}"} | _compile(function, operands, vocab=vocab)
    mesh = make_mesh(tensor=len(devices), devices=devices)
    for name in _LOOPS.value:
        yield {"program": f"decode: {name}", "chips": len(devices)} | _loop(name, mesh)


def recipes(devices: Any) -> Iterator[dict[str, Any]]:
    hbm = {"hbm_bytes": HBM_GIB[_TARGET.value.partition(":")[0]] * 2**30}
    for name in _RECIPES.value:
        module, _, argument = name.partition(":")
        config = importlib.import_module(f"configs.{module}").get_config(argument)
        mesh = dict(config.get("mesh", {"tensor": config.get("tensor")}))
        if math.prod(mesh.values()) != len(devices):
            raise SystemExit(
                f"--target={_TARGET.value} has {len(devices)} devices and {name} is for a mesh of "
                f"{mesh}: choose a slice with as many"
            )
        cfg = PRESETS[next(preset for preset in PRESETS if name.startswith(preset))]
        recipe = _training_step if "train" in config else _collection
        for label, report in recipe(config, cfg, make_mesh(**mesh, devices=devices)):
            yield {"program": f"{label}: {name}", "chips": len(devices)} | report | hbm


def with_float32(named: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """All shapes in bfloat16, and the first one in float32 as well."""
    yield from ((name, shape, jnp.bfloat16) for name, shape in named.items())
    name, shape = next(iter(named.items()))
    yield f"{name}, float32", shape, jnp.float32


def _attention(
    shape: AttentionShape, dtype: Any, array: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
    B, T, S, N, K, H = shape.B, shape.T, shape.S, shape.N, shape.K, shape.H

    def attend(q: Any, k: Any, v: Any, bits: Any, window: Any, cache: Any, ranges: Any) -> Any:
        mask: Any = shape.mask if bits is None else bits
        return window_attention(
            q, k, v, mask=mask, window_range=window, cache=cache, cache_ranges=ranges, layer=1
        )[0]

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
        window_attention_tpu.plan(T, S, N, K, H, dtype.dtype.itemsize).vmem_bytes,
    )


def _vocabulary(
    shape: StatsShape, options: tuple[str, ...], dtype: Any, array: Any
) -> tuple[Callable[..., Any], tuple[Any, ...], int]:
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
    return stats, operands, unembed_stats_tpu.plan(M, D, V, dtype.dtype.itemsize).vmem_bytes


def _training(array: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Forward and backward of what only training uses, at the shapes of one LLaDA-8B row."""

    def attention(q: Any, k: Any, v: Any) -> Any:
        return block_diffusion_attention(q, k, v, block_len=32).astype(jnp.float32).sum()

    def loss(hidden: Any, head: Any, targets: Any) -> Any:
        stats = unembed_loss(hidden, head, targets)
        return (stats.entropy - stats.log_prob).sum()

    L, N, H = 2048, 32, 128
    D, V = shapes.STATS["llada_8b block"].D, shapes.STATS["llada_8b block"].V
    heads = array((1, 2 * L, N, H), jnp.bfloat16)
    rows = (array((L, D), jnp.bfloat16), array((V, D), jnp.bfloat16), array((L,), jnp.int32))
    return {
        "block_diffusion_attention": (jax.grad(attention, argnums=(0, 1, 2)), (heads,) * 3),
        "unembed_loss": (jax.grad(loss, argnums=(0, 1)), rows),
    }


def _loop(name: str, mesh: Mesh) -> dict[str, Any]:
    """Threshold decoding with the dual cache: 256 new tokens in blocks of 32 after 3,840."""
    method = DiffusionMethod(FixedBlocks(32), cache=DualCache(), rule=Threshold(0.9))
    return _decoding(method, PRESETS[name], mesh, batch_size=1, gen_len=256, prompt_len=3840)


def _decoding(
    method: DiffusionMethod, cfg: ModelConfig, mesh: Mesh, *, batch_size: int, **lengths: int
) -> dict[str, Any]:
    """A decoding loop on a mesh, whose state is given away."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        axes = (None, "batch", "kv_heads", None, None) if x.ndim == 5 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=logical_sharding(x.shape, axes, mesh)
        )

    with jax.set_mesh(mesh):
        state = jax.eval_shape(
            lambda: init_state(cfg, method, [[0]], batch_size=batch_size, **lengths)
        )
        state, abstract_method = jax.tree.map(place, (state, jax.eval_shape(lambda: method)))
        cache_bytes = sum(
            x.dtype.itemsize * x.size for x in jax.tree.leaves(state.cache) if x.ndim == 5
        )
        compiled = _compile(
            lambda params, method, state: decode(params, cfg, method, state),
            (abstract_params(cfg, mesh), abstract_method, state),
            vocab=cfg.vocab_size,
            donate=(2,),
        )
    return compiled | {"cache_bytes_per_chip": cache_bytes // mesh.size}


def _collection(
    config: ConfigDict, cfg: ModelConfig, mesh: Mesh
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The loops of `train.trajectories`."""
    cfg = dataclasses.replace(cfg, dtype=config.dtype)
    method = override(named(config.method, config.block_len), config.changes.to_dict())
    lengths = {name: config[name] for name in ("batch_size", "gen_len", "prompt_len")}
    yield "answers", _decoding(method, cfg, mesh, **lengths)
    if config.oracle:
        answers = np.zeros((config.batch_size, config.gen_len), np.int32)
        yield "rounds", _decoding(knowing(method, answers), cfg, mesh, **lengths)


def _training_step(
    config: ConfigDict, cfg: ModelConfig, mesh: Mesh
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The step of `train.loop` with everything a config says about it, and nothing it reads."""
    cfg = dataclasses.replace(cfg, dtype=config.model.dtype)
    objective = build(config.train.objective, "train.objective")
    trainable, frozen = train_state.EVERYTHING, None
    if config.train.trainable is not None:
        trainable = build(config.train.trainable, "train.trainable")
        frozen = abstract_params(cfg, mesh)
    optim = OptimConfig(**config.optim)
    optim = dataclasses.replace(optim, decay_steps=optim.decay_steps or 1_000)
    specs = trainable.specs(cfg)
    shardings = train_state.state_shardings(specs, optim, mesh)
    state = train_state.abstract_state(
        specs, jnp.dtype(config.train.master_dtype), optim, shardings
    )

    def rows(*lengths: int) -> jax.ShapeDtypeStruct:
        shape = (config.data.batch_size, *lengths)
        axes = ("batch", *(None for _ in lengths))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=logical_sharding(shape, axes, mesh))

    prompt, completion = rows(config.data.prompt_len), rows(config.data.completion_len)
    batch = {"prompt": prompt, "completion": completion} | dict.fromkeys(
        ("prompt_start", "completion_len", "index"), rows()
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        step = train_state.jit_train_step(shardings)
        static = {"cfg": cfg, "objective": objective, "optim": optim, "trainable": trainable}
        traced = step.trace(state, batch, key, frozen, **static)
        yield "train", _report(traced, cfg.vocab_size)


def _compile(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    vocab: int | None = None,
    donate: tuple[int, ...] = (),
) -> dict[str, Any]:
    return _report(jax.jit(function, donate_argnums=donate).trace(*operands), vocab)


def _report(traced: Any, vocab: int | None) -> dict[str, Any]:
    start = time.perf_counter()
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes
    temp, alias = memory.temp_size_in_bytes, memory.alias_size_in_bytes
    return {
        "compile_s": round(time.perf_counter() - start, 1),
        "argument_bytes": arguments,
        "temp_bytes": temp,
        "alias_bytes": alias,
        "pallas_calls": text.count('custom_call_target="tpu_custom_call"'),
        "full_logits": [] if vocab is None else _spanning(text, vocab),
        "needed_bytes": arguments + temp + results - alias,
        "largest": _largest(text),
        "loop_flops": (compiled.cost_analysis() or {}).get("flops"),
    }


def _largest(program: str) -> list[str]:
    """The five largest floating-point arrays in a compiled program, with their MiB."""
    sizes = {
        f"{dtype}[{dims}]": math.prod(map(int, dims.split(","))) * int(dtype[-2:]) // 8
        for dtype, dims in set(re.findall(r"\b(b?f(?:32|16))\[([\d,]+)\]", program))
    }
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:5]
    return [f"{name} {sizes[name] >> 20} MiB" for name in names]


def _spanning(program: str, vocab: int) -> list[str]:
    """Shapes in a compiled program whose last dimension is (a chip's share of) the vocabulary."""
    shares = {vocab // n for n in (1, 2, 4, 8) if vocab % n == 0}
    shapes = set(re.findall(r"\b(?:f32|bf16)\[[\d,]+\]", program))
    return sorted(s for s in shapes if int(re.split(r"[\[,\]]", s)[-2]) in shares)


if __name__ == "__main__":
    app.run(main)
