"""What a published directory holds, and what would become of it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp

from decode.evaluation.tables import markdown
from dlm.config import ModelConfig
from dlm.hf.files import open_tensors, read_raw_config
from dlm.hf.saving import plan_files
from dlm.hf.weights import check_tensors, expected_tensors
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
