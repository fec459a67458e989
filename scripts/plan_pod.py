"""Whether a model fits on a TPU slice, on which mesh, and how fast it can be at most: without TPU.

    python -m scripts.plan_pod --slices=v5e:4x4,v6e:4x4 --preset=llada_8b --batch=1,8,64
    python -m scripts.plan_pod --slices=v5e:4x4 --recipes=llada_8b_dparallel
    python -m scripts.plan_pod --out=docs                          the table in docs/pods.md

Per slice and program, the real program (the decoding loop with the dual cache and threshold 0.9, or
a recipe's training step) is compiled ahead of time on several meshes. What is printed, per chip:

    weights, cache, other state    arguments, counted from their shards
    temporaries                    as the compiler assigned them
    moved                          bytes through a chip's links, on a ring: in a training step; in a
                                   decoding round, which judges one block; in a refresh of the
                                   cache, which reads all positions once per block
    floor                          time that a round or a refresh cannot fall below: the larger of
                                   operations over the chip's peak and of bytes (weights and cache,
                                   once) over its memory's speed, plus moved bytes over the links'
    tokens/s at most               of all rows, if `--tokens_per_round` are committed per row

The best mesh is that of the lowest floors (for training: of the least memory) among those that fit.
A floor is not a prediction. Results are kept in pods.json, and what is in there is not compiled
again: delete it to start anew.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from scripts import aot  # isort: skip  (before JAX)

import jax
from absl import app, flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from decode.diffusion.components import DualCache, FixedBlocks, Threshold
from decode.diffusion.loop import DiffusionMethod
from decode.evaluation.tables import markdown
from dlm.config import ModelConfig
from dlm.params import abstract_params
from dlm.presets import PRESETS
from dlm.sharding import make_mesh
from scripts.bench.timing import forward_cost

COLUMNS = {
    "round_ms": "round, ms at least",
    "refresh_ms": "refresh, ms at least",
    "tokens_per_s": "tokens/s at most",
}
KINDS = ("weights", "cache", "other", "temporaries")
GIB = 2**30
LENGTHS = ("prompt_len", "gen_len", "block_len", "tokens_per_round")
# Of its memory a chip keeps some for itself: a v5e leaves 15.75 of 16 GiB to programs.
USABLE = 0.98
_INTRODUCTION = """# Models on TPU slices

Written by `python -m scripts.plan_pod --slices={slices} --out=docs` on a machine without a TPU:
every program was compiled ahead of time for the slice that is named, and none has run on one.
`scripts/plan_pod.py` says how each column is counted. GiB per device (a chip; half a chip on v4 and
tpu7x)."""


Mesh = tuple[tuple[str, int], ...]  # sizes of axes


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


def mesh_name(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh if size > 1) or "one chip"


def decoding_meshes(cfg: ModelConfig, chips: int, batch: int) -> Iterator[Mesh]:
    """As many tensor shards as heads allow, then fewer, while rows last; the rest are data shards.

    Where there are more of those than rows, the cache may also be split by its slots instead.
    """
    tensor = math.gcd(chips, cfg.n_heads)
    rest = chips // tensor
    yield ("data", rest), ("tensor", tensor), ("sequence", 1)
    if rest > batch and rest % batch == 0:
        yield ("data", batch), ("tensor", tensor), ("sequence", rest // batch)
    while tensor % 2 == 0 and 2 * chips // tensor <= batch:
        tensor //= 2
        yield ("data", chips // tensor), ("tensor", tensor), ("sequence", 1)


def training_meshes(chips: int, rows: int) -> Iterator[Mesh]:
    """Parameters over all chips; the fewest tensor shards with which every chip has rows, and more.

    Args:
      chips: of the slice.
      rows: of a batch.

    Raises:
      ValueError: no mesh divides the rows.
    """
    tensors = [t for t in (1, 2, 4, 8, 16) if chips % t == 0 and rows % (chips // t) == 0][:3]
    if not tensors:
        raise ValueError(
            f"data.batch_size={rows} cannot be divided among {chips} chips with up to 16 tensor "
            "shards: choose a multiple of a sixteenth of their number"
        )
    for tensor in tensors:
        yield ("fsdp", chips // tensor), ("tensor", tensor)


def cases() -> Iterator[Case]:
    """What the flags ask for."""
    cfg = PRESETS[flags.FLAGS.preset]
    for target in flags.FLAGS.slices:
        chips = len(aot.devices_of(target))
        for batch in map(int, flags.FLAGS.batch):
            for mesh in decoding_meshes(cfg, chips, batch):
                yield Case(target, f"{flags.FLAGS.preset}, batch {batch}", mesh, batch)
        for recipe in flags.FLAGS.recipes:
            try:
                for mesh in training_meshes(chips, recipe_config(recipe).data.batch_size):
                    yield Case(target, recipe, mesh)
            except ValueError as error:
                raise ValueError(f"{recipe} on {target}: {error}") from error


def recipe_config(recipe: str) -> ConfigDict:
    """The settings of a recipe, such as "llada_8b_dparallel:released"."""
    module, _, argument = recipe.partition(":")
    config: ConfigDict = importlib.import_module(f"configs.{module}").get_config(argument)
    return config


def plan(case: Case) -> dict[str, Any]:
    """Compiles one case; if the compiler refuses, why."""
    mesh = make_mesh(**dict(case.mesh), devices=aot.devices_of(case.slice))
    cfg = PRESETS[flags.FLAGS.preset]
    try:
        report = _decoding(cfg, mesh, case.batch) if case.batch else _training(case.program, mesh)
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
        total, block = flags.FLAGS.prompt_len + flags.FLAGS.gen_len, flags.FLAGS.block_len
        found["moved_by_refresh"] = moved(-1, 1)
        found["round_ms"] = floor_ms(case, cfg, block, total, found["moved"])
        found["refresh_ms"] = floor_ms(case, cfg, total, 0, found["moved_by_refresh"])
        rounds = block / flags.FLAGS.tokens_per_round
        per_block = found["refresh_ms"] + (rounds - 1) * found["round_ms"]
        found["tokens_per_s"] = 1e3 * case.batch * block / per_block
    return found


def floor_ms(case: Case, cfg: ModelConfig, window: int, cached: int, moved: float) -> float:
    """Of one forward over a window, of which a block is judged."""
    chip, mesh = aot.chip_of(case.slice), dict(case.mesh)
    data, tensor = mesh["data"], mesh["tensor"]
    rows = case.batch // data if case.batch % data == 0 else case.batch  # else each chip has all
    cached //= mesh["sequence"]
    flops, num_bytes = forward_cost(cfg, rows, window, cached, flags.FLAGS.block_len)
    compute_ms = 1e3 * flops / tensor / (chip.tflops * 1e12)
    memory_ms = 1e3 * num_bytes / tensor / (chip.hbm_gb_s * 1e9)
    return max(compute_ms, memory_ms) + 1e3 * moved / (chip.ici_gb_s * 1e9)


def _decoding(cfg: ModelConfig, mesh: jax.sharding.Mesh, batch: int) -> dict[str, Any]:
    method = DiffusionMethod(
        FixedBlocks(flags.FLAGS.block_len), cache=DualCache(), rule=Threshold(0.9)
    )
    lengths = {"prompt_len": flags.FLAGS.prompt_len, "gen_len": flags.FLAGS.gen_len}
    report = aot.decoding(method, cfg, mesh, batch_size=batch, **lengths)
    weights = shard_bytes(abstract_params(cfg, mesh))
    return report | {"weights": weights, "cache": report["cache_bytes_per_chip"]}


def _training(recipe: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    config = recipe_config(recipe)
    cfg = PRESETS[next(preset for preset in PRESETS if recipe.startswith(preset))]
    ((_, report),) = aot.training_step(config, cfg, mesh)
    frozen = abstract_params(cfg, mesh) if config.train.trainable is not None else {}
    return report | {"weights": shard_bytes(frozen), "cache": 0}


def shard_bytes(tree: Any) -> int:
    """Bytes of one chip's shards of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def fits(case: Case, found: dict[str, Any]) -> bool:
    room = USABLE * aot.chip_of(case.slice).hbm_gib * GIB
    return "refused" not in found and found["needed"] <= room


def best(found: dict[Case, dict[str, Any]]) -> dict[tuple[str, str], Case]:
    """Per slice and program the mesh with the lowest floor, or most room, among those that fit."""
    chosen: dict[tuple[str, str], Case] = {}
    rank = lambda case: (  # noqa: E731
        not fits(case, found[case]),
        -found[case].get("tokens_per_s", 0.0),
        found[case].get("needed", math.inf),
    )
    for case in found:
        at = (case.slice, case.program)
        if at not in chosen or rank(case) < rank(chosen[at]):
            chosen[at] = case
    return chosen


def table(found: dict[Case, dict[str, Any]]) -> str:
    """A line per case; the best mesh of a program is marked."""
    chosen = set(best(found).values())
    rows = []
    for case, values in found.items():
        row = {
            "slice": case.slice,
            "program": case.program,
            "mesh": mesh_name(case.mesh) + (" *" if case in chosen and fits(case, values) else ""),
            "fits": "yes" if fits(case, values) else "no",
        }
        refused = "refused" in values
        row |= {k: "" if refused else f"{values[k] / GIB:.2f}" for k in (*KINDS, "needed")}
        row["of"] = f"{aot.chip_of(case.slice).hbm_gib}"
        row["moved MiB"] = "" if refused else f"{values['moved'] / 2**20:.1f}"
        for name in ("round_ms", "refresh_ms", "tokens_per_s"):
            digits = 0 if name == "tokens_per_s" else 2
            row[COLUMNS[name]] = f"{values[name]:,.{digits}f}" if name in values else ""
        rows.append(row)
    return markdown(rows)


def moves(found: dict[Case, dict[str, Any]]) -> str:
    """What moves most, on the best meshes."""
    rows = []
    for case in best(found).values():
        for move in found[case].get("collectives", ())[:3]:
            rows.append(
                {
                    "slice": case.slice,
                    "program": case.program,
                    "what": f"{move['op']} {move['shape']}",
                    "when": {-1: "always", 0: "round", 1: "refresh"}[move["branch"]],
                    "chips": f"{move['group']}",
                    "times": f"{move['times']}",
                    "MiB": f"{move['bytes_moved'] / 2**20:.2f}",
                }
            )
    return markdown(rows) if rows else "Nothing moves."


def draw(found: dict[Case, dict[str, Any]], path: pathlib.Path) -> None:
    """Memory by kind on the best mesh of every program, against what there is."""
    chosen = [case for case in best(found).values() if "refused" not in found[case]]
    figure = Figure(figsize=(8, 0.4 * len(chosen) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [f"{case.slice}, {case.program}" for case in chosen]
    left = [0.0] * len(chosen)
    for kind, shade in zip(KINDS, ("0.25", "0.5", "0.7", "0.88"), strict=True):
        widths = [found[case][kind] / GIB for case in chosen]
        axes.barh(names, widths, left=left, color=shade, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, case in enumerate(chosen):
        hbm = aot.chip_of(case.slice).hbm_gib
        axes.plot([hbm, hbm], [i - 0.4, i + 0.4], color="tab:red", linewidth=2)
    axes.set_xscale("symlog", linthresh=16)
    most = max(aot.chip_of(case.slice).hbm_gib for case in chosen)
    ticks = [t for t in (0, 4, 8, 12, 16, 32, 64, 96) if t <= most]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xlabel("GiB per chip (logarithmic from 16 on); red: what a chip has")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    out = pathlib.Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        wanted = list(cases())
    except ValueError as error:
        sys.exit(f"error: {error}")
    file = out / "pods.json"
    lengths = {
        name: getattr(flags.FLAGS, name)
        for name in ("prompt_len", "gen_len", "block_len", "tokens_per_round")
    }
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if known.get("lengths", lengths) != lengths:
        sys.exit(f"error: {file} is for {known['lengths']}, not {lengths}: choose another --out")
    results = known.get("cases", {})
    for case in (bar := tqdm(wanted, unit="program")):
        bar.set_description(case.key)
        if case.key not in results:
            results[case.key] = plan(case)
            about = {"lengths": lengths, "jax": jax.__version__, "cases": results}
            file.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    found = {case: results[case.key] for case in wanted}
    text = (
        f"{lengths['prompt_len']} prompt tokens, {lengths['gen_len']} new ones in blocks of "
        f"{lengths['block_len']}, {lengths['tokens_per_round']:g} committed per row and round, "
        f"bfloat16, jax {jax.__version__}. *: the best mesh.\n\n"
        f"{table(found)}\n\nWhat moves most, on the best meshes:\n\n{moves(found)}\n"
    )
    print("\n" + text)
    refused = {c.key: values["refused"] for c, values in found.items() if "refused" in values}
    if refused:
        text += "\nWhat the compiler says of those without figures:\n\n"
        text += "".join(f"- {key}: {why}\n" for key, why in refused.items())
    draw(found, out / "pods.png")
    introduction = _INTRODUCTION.format(slices=",".join(flags.FLAGS.slices))
    page = f"{introduction}\n\n![Memory](pods.png)\n\n{text}"
    (out / "pods.md").write_text(page, encoding="utf-8")
    print(f"Written: pods.md, pods.png and pods.json in {out}")


if __name__ == "__main__":
    flags.DEFINE_list("slices", ["v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:4x4x4"], "TPU slices.")
    flags.DEFINE_enum("preset", "llada_8b", PRESETS, "Whose decoding loop is planned.")
    flags.DEFINE_list("batch", ["1", "8", "64"], "Rows of the decoding loop; none if empty.")
    flags.DEFINE_list("recipes", ["llada_8b_dparallel"], "Configs whose training step is planned.")
    flags.DEFINE_integer("prompt_len", 3_840, "Tokens.")
    flags.DEFINE_integer("gen_len", 256, "Tokens.")
    flags.DEFINE_integer("block_len", 32, "Tokens.")
    flags.DEFINE_float("tokens_per_round", 4.0, "Committed per row and round.", lower_bound=1)
    flags.DEFINE_string("out", "runs/plan", "Folder for what is written.")
    app.run(main)
