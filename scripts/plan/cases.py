"""Which programs are planned, on which meshes, and what is known of one once it is compiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from decode.diffusion.components import BlockCausal, DualCache, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from dlm.config import ModelConfig
from dlm.params import abstract_params
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from scripts.bench.timing import forward_cost
from scripts.plan import aot
from scripts.plan.meshes import (
    Mesh,
    decoding_meshes,
    mesh_name,
    mesh_of_name,
    training_meshes,
)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What is decoded.

    Attributes:
      prompt_len, gen_len, block_len: tokens.
      tokens_per_round: committed per row and round.
    """

    prompt_len: int
    gen_len: int
    block_len: int
    tokens_per_round: float

    def check(self, cfg: ModelConfig) -> None:
        """ValueError unless the model has room for them."""
        if self.prompt_len + self.gen_len > cfg.max_seq_len:
            raise ValueError(
                f"prompt_len={self.prompt_len} and gen_len={self.gen_len} must be at most the "
                f"model's max_seq_len={cfg.max_seq_len} together"
            )


@dataclasses.dataclass(frozen=True)
class Case:
    """One program on one mesh.

    Attributes:
      slice: such as "v5e:4x4".
      program: "decode, batch 8", or the name of a recipe.
      mesh: sizes of its axes.
      batch: rows of a decoding program; 0 for a recipe.
    """

    slice: str
    program: str
    mesh: Mesh
    batch: int = 0

    @property
    def key(self) -> str:
        return f"{self.slice} | {self.program} | {mesh_name(self.mesh)}"

    @classmethod
    def of_key(cls, key: str) -> Case:
        """The case of a `key`, but for axes of one device."""
        target, program, mesh = key.split(" | ")
        batch = program.partition(", batch ")[2]
        axes = mesh_of_name(mesh)
        return cls(target, program, axes, int(batch or 0))


def cases(
    preset: str, slices: Sequence[str], batches: Sequence[int], recipes: Sequence[str]
) -> Iterator[Case]:
    """Every program on every mesh of every slice.

    Args:
      preset: whose decoding loop is compiled.
      slices: such as "v5e:4x4".
      batches: rows of the loop.
      recipes: configs whose training step is compiled.

    Raises:
      ValueError: a slice or a mesh that cannot be.
    """
    cfg = PRESETS[preset]
    for target in slices:
        chips = len(aot.devices_of(target))
        for batch in batches:
            for mesh in decoding_meshes(cfg, chips, batch):
                yield Case(target, f"{preset}, batch {batch}", mesh, batch)
        for recipe in recipes:
            try:
                for mesh in training_meshes(chips, aot.recipe_config(recipe).data.batch_size):
                    yield Case(target, recipe, mesh)
            except ValueError as error:
                raise ValueError(f"{recipe} on {target}: {error}") from error


def plan(case: Case, preset: str, lengths: Lengths) -> dict[str, Any]:
    """Compiles one case; if the compiler refuses, "refused" says why."""
    mesh = make_mesh(**dict(case.mesh), devices=aot.devices_of(case.slice))
    cfg = PRESETS[preset]
    try:
        if case.batch:
            report = _decoding(cfg, mesh, case.batch, lengths)
        else:
            report = _training(case.program, mesh)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"refused": str(error).strip().splitlines()[0][:200]}
    temporaries = report["temp_bytes"]
    known = report["weights"] + report["cache"]
    moves = report["collectives"]

    def moved(*branches: int) -> float:
        return sum(move["bytes_moved"] for move in moves if move["branch"] in branches)

    found = {
        "weights": report["weights"],
        "cache": report["cache"],
        "other": max(report["needed_bytes"] - temporaries - known, 0),
        "temporaries": temporaries,
        "needed": report["needed_bytes"],
        "full_logits": report["full_logits"],
        "collectives": moves,
        "compile_s": report["compile_s"],
        "moved": moved(-1, 0) if case.batch else moved(-1, 0, 1),
    }
    if case.batch:
        total, block = lengths.prompt_len + lengths.gen_len, lengths.block_len
        found["moved_by_refresh"] = moved(-1, 1)
        rounds = block / lengths.tokens_per_round
        if cfg.block_len is None:
            judged, read, refreshes = block, total, 1.0
        else:  # a block and the one before it; the prompt is read once
            judged, read = 2 * block, lengths.prompt_len
            refreshes, rounds = block / lengths.gen_len, rounds + 1
        found["round_ms"] = floor_ms(case, cfg, block, judged, total, found["moved"])
        found["refresh_ms"] = floor_ms(case, cfg, block, read, 0, found["moved_by_refresh"])
        per_block = refreshes * found["refresh_ms"] + (rounds - 1) * found["round_ms"]
        found["tokens_per_s"] = 1e3 * case.batch * block / per_block
    return found


def floor_ms(
    case: Case, cfg: ModelConfig, judged: int, window: int, cached: int, moved: float
) -> float:
    """Of one forward over a window, of which a block is judged."""
    chip, mesh = aot.chip_of(case.slice), dict(case.mesh)
    data, tensor = mesh["data"], mesh["tensor"]
    rows = case.batch // data if case.batch % data == 0 else case.batch  # else each chip has all
    cached //= mesh["sequence"]
    flops, num_bytes = forward_cost(cfg, rows, window, cached, judged)
    compute_ms = 1e3 * flops / tensor / (chip.tflops * 1e12)
    memory_ms = 1e3 * num_bytes / tensor / (chip.hbm_gb_s * 1e9)
    return max(compute_ms, memory_ms) + 1e3 * moved / (chip.ici_gb_s * 1e9)


def _decoding(
    cfg: ModelConfig, mesh: jax.sharding.Mesh, batch: int, lengths: Lengths
) -> dict[str, Any]:
    parts: dict[str, Any] = {"scheduler": FixedBlocks(lengths.block_len), "cache": DualCache()}
    if cfg.block_len is not None:
        parts["scheduler"] = FixedBlocks(cfg.block_len, aligned=True)
        parts["cache"] = BlockCausal(cfg.block_len)
    method = DiffusionMethod(**parts, rule=Threshold(0.9))
    report = aot.decoding(
        method, cfg, mesh, batch_size=batch, prompt_len=lengths.prompt_len, gen_len=lengths.gen_len
    )
    weights = shard_bytes(abstract_params(cfg, mesh))
    return report | {"weights": weights, "cache": report["cache_bytes_per_chip"]}


def _training(recipe: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    config, cfg = aot.recipe_config(recipe), aot.recipe_model(recipe)
    ((_, report),) = aot.training_step(config, cfg, mesh)
    frozen = abstract_params(cfg, mesh) if config.train.trainable is not None else {}
    return report | {"weights": shard_bytes(frozen), "cache": 0}


def shard_bytes(tree: Any) -> int:
    """Bytes of one chip's shards of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
