"""Meshes and logical axes: where arrays live, said once.

Arrays name their dimensions with logical words ("batch", "heads", "vocab"); `RULES` maps those to
the mesh axes `data`, `fsdp`, `tensor` and `sequence`. Without a mesh everything here does nothing,
so the same model code runs on one CPU and on a pod.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("slots", "sequence"),
    ("experts", "tensor"),
    ("ffn", "tensor"),
    ("vocab", "tensor"),
    ("rank", "fsdp"),
    ("layers", None),
)


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `MESH_AXES`.

    Args:
      data: shards of the batch only.
      fsdp: shards of batch and parameters.
      tensor: shards of heads, experts or MLP width, and vocabulary.
      sequence: shards of the slots of key/value caches, for prefixes that are too long for one
        device; everything else is on all of them.
      devices: which devices; by default the first ones of `jax.devices()`.

    Raises:
      ValueError: if there are not that many devices.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, tensor, sequence), strict=True))
    size = math.prod(sizes.values())
    devices = jax.devices() if devices is None else devices
    if size > len(devices) or size < 1:
        raise ValueError(
            f"mesh {' x '.join(f'{axis}={n}' for axis, n in sizes.items())} needs {size} devices, "
            f"but there are {len(devices)}: choose sizes whose product is at most that"
        )
    # Axes may share a dimension of the slice: 8 tensor shards on 4 x 4 chips, for example.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices[:size], allow_split_physical_axes=True
    )
    return Mesh(placed, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def check_placing(mesh: Any, rules: Any) -> None:
    """Makes sure that arguments are a mesh or None, and rules.

    Raises:
      ValueError: they are something else.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r} must be a Mesh, as make_mesh makes, or None")
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2  # noqa: E731
    if not isinstance(rules, (tuple, list)) or not all(map(is_pair, rules)):
        raise ValueError(f"rules={rules!r} must be pairs of axes, as dlm.sharding.RULES has them")


def _partition_spec(
    shape: Sequence[int], axes: Sequence[str | None], sizes: dict[str, int], rules: Rules
) -> PartitionSpec:
    """Resolves logical axes; drops mesh axes that do not divide the dimension, or are taken."""
    table = dict(rules)
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for dim, axis in zip(shape, axes, strict=True):
        if axis is not None and axis not in table:
            raise ValueError(f"logical axis {axis!r} is not in the rules {sorted(table)}")
        target = None if axis is None else table[axis]
        names = (target,) if isinstance(target, str) else (target or ())
        names = tuple(name for name in names if name in sizes and name not in used)
        if not names or dim % math.prod(sizes[name] for name in names):
            entries.append(None)
            continue
        used.update(names)
        entries.append(names)
    return PartitionSpec(*entries)


def batch_shards() -> int:
    """Into how many parts the mesh in use splits a batch; 1 without a mesh."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp"))


def split_axes(**sizes: int) -> dict[str, tuple[str, ...] | None]:
    """Over which axes of the mesh in use each logical axis, of the size given, is split.

    For code that runs per shard (`jax.shard_map`). None: not split, because there is no mesh, or
    because the mesh axes do not divide the size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = _partition_spec(tuple(sizes.values()), tuple(sizes), dict(mesh.shape), RULES)
    return dict(zip(sizes, spec, strict=True))


def slots_axis(num_slots: int) -> str | None:
    """The mesh axis over which a cache of so many slots is split; None: all devices have all."""
    size = dict(jax.sharding.get_abstract_mesh().shape).get("sequence", 1)
    return "sequence" if size > 1 and num_slots % size == 0 else None


def logical_sharding(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mesh | AbstractMesh,
    rules: Rules = RULES,
) -> NamedSharding:
    """The sharding of an array of `shape` whose dimensions are called `axes`."""
    return NamedSharding(mesh, _partition_spec(shape, axes, dict(mesh.shape), rules))


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Constrains the sharding of `x` inside `jax.jit`; does nothing when no mesh is set.

    Args:
      x: any array.
      *axes: a logical axis name or None per dimension.
      rules: logical axis to mesh axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(
        x, _partition_spec(x.shape, axes, dict(mesh.shape), rules)
    )


def per_shard(
    function: Callable[..., Any], operands: dict[str, Any], specs: dict[str, Any], out_specs: Any
) -> Any:
    """Calls `function` with `operands` by name: on every device's share of them, on a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(**operands)
    run = lambda operands: function(**operands)  # noqa: E731
    return jax.shard_map(run, in_specs=(specs,), out_specs=out_specs, check_vma=False)(operands)
