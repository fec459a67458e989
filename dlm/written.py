"""Files as they are written: what goes wrong names the file, which a full disk alone does not."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy


@contextlib.contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """Makes an OSError with the name of `file` of whatever keeps it from being written."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise OSError(
            f"{file} cannot be written ({said}): make room there, or mend what is wrong"
        ) from error


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8. OSError: it cannot be."""
    with naming(file):
        pathlib.Path(file).write_text(text, encoding="utf-8")


def write_json(file: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON that people may read. OSError: it cannot be."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    file: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays by name, in the format of safetensors. OSError: they cannot be."""
    with naming(file):
        safetensors.numpy.save_file(
            dict(tensors), file, metadata=dict(metadata) if metadata else None
        )
