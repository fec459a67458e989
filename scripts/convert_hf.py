"""Checks a published checkpoint, and writes it again in another dtype or in files of another size.

    python -m scripts.convert_hf --checkpoint=path/to/LLaDA-8B-Instruct --dry_run
    python -m scripts.convert_hf --checkpoint=path/to/Qwen3-8B --dry_run --mesh=fsdp=4,tensor=2
    python -m scripts.convert_hf --checkpoint=path/to/Qwen3-8B --out=path/to/copy --dtype=bfloat16

`dlm.load` reads published directories as they are, so nothing has to be converted before it is
used: a copy is worth while where float32 files are read again and again, or files are too large.
With `--dry_run` only headers are read. It says what the model is, whether the tensors are all there
and of the right shapes, what would be written, and, with `--mesh`, how much each device would hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from decode.evaluation.tables import markdown
from dlm.config import ModelConfig
from dlm.hf.files import DTYPES, open_tensors, read_config, read_raw_config
from dlm.hf.weights import check_tensors, convert_hf, expected_tensors, plan_files
from dlm.params import num_params, param_shardings, param_specs
from dlm.sharding import MESH_AXES


def as_size(num_bytes: int) -> str:
    """In GiB, or what is below it."""
    power = min(3, max(0, (num_bytes.bit_length() - 1) // 10))
    return (
        f"{num_bytes / 2 ** (10 * power):.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
    )


def describe(root: pathlib.Path, cfg: ModelConfig, shard_bytes: int, mesh: dict[str, int]) -> str:
    """What a directory holds, and what would become of it.

    Args:
      root: the directory.
      cfg: its model, in the dtype that is wanted.
      shard_bytes: of the files that would be written.
      mesh: axis -> size; empty: nothing is said about devices.

    Raises:
      FileNotFoundError, ValueError: the tensors are not those of `cfg`.
    """
    _, form = read_raw_config(root)
    with contextlib.ExitStack() as stack:
        files = open_tensors(root, stack)
        check_tensors(root, files, cfg, form)
        dtypes = sorted({tensor.get_dtype() for tensor in files.values()})
    weights = sorted(root.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in weights)
    changed = {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if getattr(cfg, field.name) not in (None, field.default)
    }
    lines = [
        f"{root}: {form.model_type}, {num_params(cfg):,} parameters",
        ", ".join(f"{name}={value}" for name, value in changed.items()),
        f"{len(files)} tensors, all as they should be, {'/'.join(dtypes)}, in "
        f"{len(weights)} file(s) of "
        f"{as_size(size)}",
    ]
    written = plan_files(cfg, form, shard_bytes)
    shapes = dict(expected_tensors(cfg, form))
    item = jnp.dtype(cfg.dtype).itemsize
    sizes = [item * sum(math.prod(shapes[name]) for name in names) for names in written]
    lines.append(
        f"as {cfg.dtype}: {as_size(sum(sizes))} in {len(sizes)} file(s), the largest of "
        f"{as_size(max(sizes))}, which is what memory has to hold"
    )
    if mesh:
        devices = jax.sharding.AbstractMesh(
            tuple(mesh.get(axis, 1) for axis in MESH_AXES), MESH_AXES
        )
        rows, held = [], 0
        for (path, spec), sharding in zip(
            jax.tree.leaves_with_path(param_specs(cfg)),
            jax.tree.leaves(param_shardings(cfg, devices)),
            strict=True,
        ):
            part = sharding.shard_shape(spec.shape)
            held += item * math.prod(part)
            rows.append(
                {
                    "parameter": jax.tree_util.keystr(path, simple=True, separator="/"),
                    "shape": str(list(spec.shape)),
                    "per device": str(list(part)),
                    "size": as_size(item * math.prod(part)),
                }
            )
        axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
        lines += [f"on {axes}: {as_size(held)} per device", markdown(rows)]
    return "\n\n".join(lines)


def parse_mesh(text: list[str]) -> dict[str, int]:
    """{"fsdp": 4, "tensor": 2} of ["fsdp=4", "tensor=2"]; ValueError if it is nothing like that."""
    mesh = {}
    for part in text:
        axis, _, size = part.partition("=")
        if axis not in ("data", "fsdp", "tensor") or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh has {part!r}, which must be data, fsdp or tensor, =, and a positive number"
            )
        mesh[axis] = int(size)
    return mesh


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: this command takes only flags")
    logging.set_verbosity(logging.WARNING)
    root, shard_bytes = pathlib.Path(flags.FLAGS.checkpoint), int(flags.FLAGS.shard_gb * 1e9)
    dtype = flags.FLAGS.dtype or None
    if dtype not in (None, *DTYPES.values()):
        sys.exit(f"error: --dtype={dtype!r} must be one of {', '.join(DTYPES.values())}")
    try:
        mesh = parse_mesh(flags.FLAGS.mesh)
        print(describe(root, read_config(root, dtype), shard_bytes, mesh))
        if flags.FLAGS.dry_run:
            return
        if not flags.FLAGS.out:
            raise ValueError("--out='' must name the folder to write, unless --dry_run is given")
        convert_hf(root, flags.FLAGS.out, dtype, shard_bytes)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"\nWritten: {flags.FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A directory in a published format.", required=True)
    flags.DEFINE_string("out", "", "The directory to make.")
    flags.DEFINE_string("dtype", "", "Such as bfloat16; empty: as it is.")
    flags.DEFINE_float("shard_gb", 5.0, "Largest file that holds several tensors, in GB.", 1e-6)
    flags.DEFINE_list("mesh", [], "Such as fsdp=4,tensor=2: what each device would hold.")
    flags.DEFINE_bool("dry_run", False, "Reads headers only, and writes nothing.")
    app.run(main)
