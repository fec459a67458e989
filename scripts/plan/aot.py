"""Real programs compiled for TPU slices, on a machine without: what they need, and what moves.

libtpu's compiler needs no TPU. It is found installed (the version that `pip install 'jax[tpu]'`
would take), or where `make .venv/libtpu` puts it, beside the environment. Import this module
before anything starts JAX.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# In the environment itself it would make every start of JAX look for a TPU.
sys.path.append(str(pathlib.Path(sys.prefix, "libtpu")))
# Before JAX starts: no search for a TPU that is not there.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.diffusion.points import named, override
from dlm.config import ModelConfig
from dlm.params import abstract_params
from dlm.presets import PRESETS
from dlm.sharding import logical_sharding
from dlm.trainable import Learned, Trainable
from scripts.plan.collectives import collectives
from train import step as step_lib
from train.collect.trajectories import knowing
from train.config import OptimConfig, build


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a slice can do, as Google's documentation gives it.

    A device is a chip; on v4 and tpu7x it is half a chip.

    Attributes:
      hbm_gib: memory.
      tflops: bfloat16 products, 10^12 operations per second.
      hbm_gb_s: 10^9 bytes per second from memory.
      ici_gb_s: 10^9 bytes per second between chips, all links of a device together.
    """

    hbm_gib: int
    tflops: float
    hbm_gb_s: float
    ici_gb_s: float


CHIPS = {
    "v4": Chip(16, 137.5, 614, 150),
    "v5e": Chip(16, 197, 819, 200),
    "v5p": Chip(95, 459, 2765, 600),
    "v6e": Chip(32, 918, 1640, 448),
    "tpu7x": Chip(96, 1153, 3690, 600),
}


def chip_of(target: str) -> Chip:
    """Of a slice such as "v5e:4x4"; ValueError for a kind that is not known."""
    kind = target.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"slice {target!r} must begin with one of {', '.join(CHIPS)}")
    return CHIPS[kind]


def devices_of(target: str) -> Any:
    """Devices of a slice, to make a mesh of; ValueError if it cannot be compiled for."""
    chip_of(target)
    try:
        return topologies.get_topology_desc(target, platform="tpu").devices
    except Exception as error:
        raise ValueError(
            f"slice {target!r} cannot be compiled for here: {error}. It needs libtpu (Linux "
            "x86-64, make .venv/libtpu) and a slice that exists, such as v5e:2x2 or v5p:2x2x1"
        ) from error


def recipe_config(recipe: str) -> ConfigDict:
    """The settings of a recipe, such as "llada_8b_dparallel:released"."""
    module, _, argument = recipe.partition(":")
    config: ConfigDict = importlib.import_module(f"configs.{module}").get_config(argument)
    return config


def recipe_model(recipe: str) -> ModelConfig:
    """The preset whose name a recipe begins with; ValueError if there is none."""
    for preset, cfg in PRESETS.items():
        if recipe.startswith(preset):
            return cfg
    raise ValueError(f"recipe {recipe!r} must begin with one of {', '.join(PRESETS)}")


def decoding(
    method: DiffusionMethod,
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    gen_len: int,
    prompt_len: int,
) -> dict[str, Any]:
    """A decoding loop on a mesh, whose state is given away."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        axes = (None, "batch", "kv_heads", "slots", None) if x.ndim == 5 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=logical_sharding(x.shape, axes, mesh)
        )

    with jax.set_mesh(mesh):
        state = jax.eval_shape(
            lambda: init_state(
                cfg, method, [[0]], gen_len=gen_len, prompt_len=prompt_len, batch_size=batch_size
            )
        )
        state, abstract_method = jax.tree.map(place, (state, jax.eval_shape(lambda: method)))
        cache_bytes = sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(state.cache)
            if x.ndim == 5
        )
        compiled = compile_for(
            lambda params, method, state: decode(params, cfg, method, state),
            (abstract_params(cfg, mesh), abstract_method, state),
            vocab=cfg.vocab_size,
            donate=(2,),
        )
    return compiled | {"cache_bytes_per_chip": cache_bytes}


def collection(
    config: ConfigDict, cfg: ModelConfig, mesh: Mesh
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The loops of `train.collect.trajectories`."""
    cfg = dataclasses.replace(cfg, dtype=config.dtype)
    method = override(named(config.method, config.block_len), config.changes.to_dict())
    lengths = {name: config[name] for name in ("batch_size", "gen_len", "prompt_len")}
    yield "answers", decoding(method, cfg, mesh, **lengths)
    if config.oracle:
        answers = np.zeros((config.batch_size, config.gen_len), np.int32)
        yield "rounds", decoding(knowing(method, answers), cfg, mesh, **lengths)


def training_step(
    config: ConfigDict, cfg: ModelConfig, mesh: Mesh
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The step of `train.loop` with everything a config says about it, and nothing it reads."""
    cfg = dataclasses.replace(cfg, dtype=config.model.dtype)
    objective = build(config.train.objective, "train.objective")
    trainable: Trainable = step_lib.EVERYTHING
    frozen: Learned | None = None
    if config.train.trainable is not None:
        trainable = build(config.train.trainable, "train.trainable")
        frozen = Learned(abstract_params(cfg, mesh))
    optim = OptimConfig(**config.optim)
    optim = dataclasses.replace(optim, decay_steps=optim.decay_steps or 1_000)
    specs = trainable.specs(cfg)
    shardings = step_lib.state_shardings(specs, optim, mesh)
    state = step_lib.abstract_state(specs, jnp.dtype(config.train.master_dtype), optim, shardings)

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
        step = step_lib.jit_train_step(shardings)
        static = {"cfg": cfg, "objective": objective, "optim": optim, "trainable": trainable}
        traced = step.trace(state, batch, key, frozen, **static)
        yield "train", report(traced, cfg.vocab_size)


def compile_for(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    vocab: int | None = None,
    donate: tuple[int, ...] = (),
) -> dict[str, Any]:
    return report(jax.jit(function, donate_argnums=donate).trace(*operands), vocab)


def report(traced: Any, vocab: int | None) -> dict[str, Any]:
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
        "collectives": [
            dataclasses.asdict(move) | {"bytes_moved": move.bytes_moved}
            for move in collectives(text)
        ],
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
