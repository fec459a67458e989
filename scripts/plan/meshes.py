"""Meshes worth compiling for, given the chips of a slice."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dlm.config import ModelConfig

Mesh = tuple[tuple[str, int], ...]  # sizes of axes


def mesh_name(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh if size > 1) or "one chip"


def mesh_of_name(name: str) -> Mesh:
    """The mesh that `mesh_name` names, without axes of one device."""
    axes = (part.split() for part in name.split(" x ") if name != "one chip")
    return tuple((axis, int(size)) for axis, size in axes)


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
