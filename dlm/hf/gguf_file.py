"""A GGUF file: what its header says, and tensors that are dequantised when they are asked for.

The header is read here and not by `gguf.GGUFReader`, which makes several arrays per entry of a
vocabulary (seconds, and hundreds of megabytes for 150,000 tokens) and believes every length that a
damaged file states. What the numbers in it mean, and the quantised blocks, are the package's.

Reference: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

# Kinds of tensors that `gguf.quants` gives as float32, and that need no tensor beside them.
READABLE = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4",
})  # fmt: skip

_CHUNK = 2**22  # numbers that are dequantised at a time, 16 MB of float32


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor in a file, indexed as a safetensors slice is; nothing else of it is read.

    Attributes:
      path: the file.
      offset: where its bytes begin.
      kind: such as "F16" or "Q4_K".
      shape: outermost dimension first; the last one is cut into the blocks of `kind`.
      dtype: of what is given.
      head_dim: H, where rows of H are stored for rotations of neighbours (0 with 1, 2 with 3, ...)
        and given for rotations of halves (0 with H/2, ...); None: rows are given as stored.
      shift: added to what is stored, in float32.
    """

    path: pathlib.Path
    offset: int
    kind: str
    shape: tuple[int, ...]
    dtype: Any = np.float32
    head_dim: int | None = None
    shift: float = 0.0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self._row_bytes

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """As safetensors names it; of quantised tensors that of what they stand for."""
        return self.kind if self.kind in ("F16", "BF16") else "F32"

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part that `index` says, one slice without steps per dimension, in `dtype`."""
        shape, (*lead, columns) = self.shape, index
        if len(shape) == 1:  # one row; as a column, so that it is ordered and cut as rows are
            shape, lead, columns = (*shape, 1), list(index), slice(None)
        rows = np.arange(math.prod(shape[:-1])).reshape(shape[:-1])[tuple(lead)]
        start, stop, _ = columns.indices(shape[-1])
        stored = rows.ravel()
        if self.head_dim is not None:
            head, inside = np.divmod(stored, self.head_dim)
            half, pair = np.divmod(inside, self.head_dim // 2)
            stored = head * self.head_dim + 2 * pair + half
        ordered = np.sort(stored)
        values = np.empty((len(ordered), stop - start), self.dtype)
        num = max(1, _CHUNK // shape[-1])
        for span in np.split(np.arange(len(ordered)), 1 + np.flatnonzero(np.diff(ordered) != 1)):
            for at in range(0, len(span), num):
                chunk = span[at : at + num]
                values[chunk] = self._read(int(ordered[chunk[0]]), len(chunk), start, stop)
        if self.head_dim is not None:
            values = values[np.searchsorted(ordered, stored)]
        return values.reshape(*rows.shape, *(() if len(self.shape) == 1 else (stop - start,)))

    @property
    def _row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return self.shape[-1] // block * size

    def _read(self, row: int, num: int, start: int, stop: int) -> np.ndarray:
        """float32 of some rows and columns; a vector's rows are its single numbers."""
        kind = GGMLQuantizationType[self.kind]
        block, size = GGML_QUANT_SIZES[kind]
        row_bytes = size if len(self.shape) == 1 else self._row_bytes
        raw = np.fromfile(
            self.path, np.uint8, num * row_bytes, offset=self.offset + row * row_bytes
        ).reshape(num, row_bytes)
        first, last = start // block, -(-stop // block)
        raw = np.ascontiguousarray(raw[:, first * size : last * size])
        values = quants.dequantize(raw, kind)[:, start - first * block : stop - first * block]
        return values + np.float32(self.shift) if self.shift else values


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a file holds.

    Attributes:
      path: the file.
      metadata: key -> number, bool, string, or list of these.
      tensors: by name.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads the header of a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a whole GGUF file, of version 2 or 3 and little-endian.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path={str(path)!r} is not a file: give a downloaded .gguf file")
    size = file.stat().st_size
    if size < 24:
        raise ValueError(f"{file} is not a whole GGUF file: it has only {size} bytes")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            metadata, tensors = _Header(data).read(file)
        except _UnknownKindError as error:
            raise ValueError(f"{file}: {error}") from error
        except (struct.error, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{file} is not a whole GGUF file ({error}); get it again") from error
    for name, tensor in tensors.items():
        if tensor.offset + tensor.num_bytes > size:
            raise ValueError(
                f"{file} is not a whole GGUF file: {name} ends at byte "
                f"{tensor.offset + tensor.num_bytes} of {size}; get it again"
            )
    return GGUFFile(file, metadata, tensors)


class _UnknownKindError(ValueError):
    """Of a file that may be whole."""


class _Header:
    """Reads one value after the other; raises `ValueError` where a length exceeds the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def read(self, path: pathlib.Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        magic, version = self.data[:4], struct.unpack_from("<I", self.data, 4)[0]
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(
                f"it begins with {magic!r} and version {version}, and must with {_MAGIC!r} and "
                f"version {' or '.join(map(str, _VERSIONS))}, little-endian"
            )
        self.at = 8
        num_tensors, num_values = self.scalar("Q"), self.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(self.count(num_values, 12)):
            key = self.string()
            if key in metadata:
                raise ValueError(f"it gives {key} twice")
            metadata[key] = self.value(self.scalar("I"))
        found = [self.tensor() for _ in range(self.count(num_tensors, 24))]
        align = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise ValueError(f"general.alignment={align!r} is not a power of two")
        start = -(-self.at // align) * align
        tensors = {
            name: GGUFTensor(path, start + at, kind, shape) for name, kind, shape, at in found
        }
        if len(tensors) < len(found):
            raise ValueError("two of its tensors have the same name")
        return metadata, tensors

    def tensor(self) -> tuple[str, str, tuple[int, ...], int]:
        """Name, kind, shape and offset behind the header."""
        name, num_dims = self.string(), self.scalar("I")
        shape = tuple(self.scalar("Q") for _ in range(self.count(num_dims, 8)))[::-1]
        number, offset = self.scalar("I"), self.scalar("Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise _UnknownKindError(
                f"tensor {name} is of the unknown kind {number}; those that are read are "
                f"{', '.join(sorted(READABLE))}"
            ) from error
        if not shape or shape[-1] % GGML_QUANT_SIZES[kind][0] or not all(shape):
            raise ValueError(f"tensor {name} of kind {kind.name} has the shape {list(shape)}")
        return name, kind.name, shape, offset

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            kind, num = self.scalar("I"), self.scalar("Q")
            if kind == GGUFValueType.STRING:
                return [self.string() for _ in range(self.count(num, 8))]
            letter = self.letter(kind)
            num = self.count(num, struct.calcsize(letter))
            values = struct.unpack_from(f"<{num}{letter}", self.data, self.at)
            self.at += num * struct.calcsize(letter)
            return list(values)
        return self.scalar(self.letter(kind))

    def letter(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"a value is of the unknown kind {kind}")
        return _SCALARS[GGUFValueType(kind)]

    def scalar(self, letter: str) -> Any:
        value = struct.unpack_from("<" + letter, self.data, self.at)[0]
        self.at += struct.calcsize(letter)
        return value

    def string(self) -> str:
        num = self.count(self.scalar("Q"), 1)
        self.at += num
        return self.data[self.at - num : self.at].decode()

    def count(self, num: int, size: int) -> int:
        """`num`, if so many things of at least `size` bytes can follow."""
        if num * size > len(self.data) - self.at:
            raise ValueError(f"{num} entries are to follow byte {self.at}, and the file ends")
        return num
