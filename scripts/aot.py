"""Real programs compiled for TPU slices, on a machine without: what they need, and what moves.

libtpu's compiler needs no TPU: `pip install libtpu` (the version that `pip install 'jax[tpu]'`
would take). Import this module before anything starts JAX.
"""

from __future__ import annotations

import collections
import dataclasses
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
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from decode.diffusion.loop import DiffusionMethod, decode, init_state
from decode.diffusion.points import named, override
from dlm.config import ModelConfig
from dlm.params import abstract_params
from dlm.sharding import logical_sharding
from train import train_state
from train.config import OptimConfig, build
from train.trajectories import knowing


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
            "x86-64, pip install libtpu) and a slice that exists, such as v5e:2x2 or v5p:2x2x1"
        ) from error


# ---- Programs ----------------------------------------------------------------------------------


def decoding(
    method: DiffusionMethod, cfg: ModelConfig, mesh: Mesh, *, batch_size: int, **lengths: int
) -> dict[str, Any]:
    """A decoding loop on a mesh, whose state is given away."""

    def place(x: Any) -> jax.ShapeDtypeStruct:
        axes = (None, "batch", "kv_heads", "slots", None) if x.ndim == 5 else (None,) * x.ndim
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=logical_sharding(x.shape, axes, mesh)
        )

    with jax.set_mesh(mesh):
        state = jax.eval_shape(
            lambda: init_state(cfg, method, [[0]], batch_size=batch_size, **lengths)
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
    """The loops of `train.trajectories`."""
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


# ---- What moves between chips ------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_MOVES = re.compile(
    r"= (?P<shape>.*?) (?P<op>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LIMIT = re.compile(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_ARRAY = re.compile(r"\b(pred|bf|f|s|u)(\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer in a program.

    Attributes:
      op: such as "all-gather".
      shape: of what it gives, per chip.
      num_bytes: of that.
      group: chips that take part.
      branch: of the conditional that it is in, from 0 (false); -1: it runs in any case.
      times: how often it runs: loops over layers count their rounds, others once.
    """

    op: str
    shape: str
    num_bytes: int
    group: int
    branch: int
    times: int

    @property
    def bytes_moved(self) -> float:
        """Through the links of a chip, all times together, on a ring."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.op, share)
        if self.op == "reduce-scatter":
            factor *= self.group  # what it gives is a share of what it takes
        return self.times * factor * self.num_bytes


def collectives(program: str) -> list[Collective]:
    """All transfers of a compiled program (its text), those that move most first."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    found: collections.Counter[tuple[str, str, int, int, int]] = collections.Counter()
    pending = [(entry, 1, -1)]
    while pending:
        name, times, branch = pending.pop()
        for line in lines.get(name, ()):
            if move := _MOVES.search(line):
                shape, num_bytes = _largest_of(move["shape"])
                found[move["op"], shape, num_bytes, _group_size(line), branch] += times
            if loop := _LOOP.search(line):
                rounds = _rounds(lines.get(loop[1], []))
                pending.append((loop[2], times * rounds, branch))
            pending += [(callee, times, branch) for callee in _CALLS.findall(line)]
            if branches := _BRANCHES.search(line):
                for i, callee in enumerate(branches[1].split(",")):
                    pending.append((callee.strip(" %"), times, i if branch < 0 else branch))
    moves = [Collective(*key, times) for key, times in found.items()]
    return sorted(moves, key=lambda move: -move.bytes_moved)


def _rounds(condition: list[str]) -> int:
    """How often a loop runs that counts up to a constant; 1 of any other."""
    for line in condition:
        if limit := _LIMIT.search(line):
            for other in condition:
                if constant := re.search(rf"%{re.escape(limit[1])} = .* constant\((\d+)\)", other):
                    return int(constant[1])
    return 1


def _largest_of(shapes: str) -> tuple[str, int]:
    """The largest array of an array or a tuple of them, and its bytes."""
    best = ("", 0)
    for kind, bits, dims in _ARRAY.findall(shapes):
        size = math.prod(int(d) for d in dims.split(",") if d) * max(int(bits or 8) // 8, 1)
        if size > best[1]:
            best = (f"{kind}{bits}[{dims}]", size)
    return best


def _group_size(line: str) -> int:
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(groups[1].split(","))
    return 2  # a permutation names pairs
