"""Models are written in the published format that can hold them; see `dlm.hf.weights`."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dlm import written
from dlm.config import ModelConfig
from dlm.hf.files import (
    INDEX,
    SINGLE,
    format_for,
    open_tensors,
    raw_config,
    read_config,
    read_raw_config,
    token_ids,
)
from dlm.hf.format import Format, Stored, locate
from dlm.hf.generation import write_generation
from dlm.hf.weights import check_tensors, expected_tensors, in_order, leaves_of, with_prefix
from dlm.params import Apart, Params, abstract_params, param_specs, parted
from dlm.tokenizer import Tokenizer

# Kinds of files beside the weights that `convert_hf` keeps.
COPIED = ("", ".jinja", ".json", ".md", ".model", ".py", ".tiktoken", ".txt")


def save_hf(
    path: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer | None = None,
    generation: Mapping[str, Any] = types.MappingProxyType({}),
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model in the published format that can hold it, see `format_for`.

    Everything is written to a directory beside `path` that gets its name at the very end, so an
    interrupted save never looks like a model.

    Args:
      path: the directory to make; it must not exist, or be empty.
      params: as `abstract_params(cfg)`, or laid `apart`.
      cfg: the model.
      tokenizer: written too, if given.
      generation: how it is meant to generate, see `dlm.hf.generation`.
      shard_bytes: largest file, except for single tensors above it; beyond it the model goes to
        several files and an index.

    Raises:
      FileExistsError: there is something at `path`.
      ValueError: no published format can express `cfg`, or the parameters are not its own.
    """
    form = format_for(cfg)
    params = parted(params)
    _check_params(params, cfg)
    leaves = leaves_of(params)[0]
    # Tensor -> the leaves that it holds: which, where in it, and at which layer and expert.
    sources: dict[str, list[tuple[str, Stored, tuple[int, ...]]]] = {}
    for leaf in leaves:
        key, layers = locate(leaf, cfg)
        stored = form.tensors[key]
        shape = [len(layers)] if "{}" in stored.name else []
        shape += [leaves[leaf].shape[1]] if stored.is_per_expert else []
        for name, index in zip(stored.names(layers, cfg), np.ndindex(*shape), strict=True):
            sources.setdefault(name, []).append((leaf, stored, index))

    def read(name: str) -> np.ndarray:
        parts = sorted(sources[name], key=lambda part: part[1].part)
        arrays = [
            _to_stored(_entry(leaves[leaf], index), stored, cfg) for leaf, stored, index in parts
        ]
        axis = parts[0][1].axis
        return arrays[0] if axis is None else np.concatenate(arrays, axis=axis)

    with _new_directory(path) as unfinished:
        written.write_json(unfinished / "config.json", raw_config(cfg, form))
        written.write_json(
            unfinished / "generation_config.json", token_ids(cfg) | write_generation(generation)
        )
        if tokenizer is not None:
            tokenizer.save(unfinished)
        write_tensors(unfinished, cfg, form, read, shard_bytes)


def convert_hf(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a published model again: in another dtype, in files of another size.

    Tensors are read one by one, so that memory holds one file of what is written and no model.
    What else is in the directory (tokenizer, generation settings, licence, code) is copied.

    Args:
      source: a directory that `read_config` can read.
      path: the directory to make; it must not exist, or be empty.
      dtype: such as "bfloat16"; None: as it is.
      shard_bytes: as in `save_hf`.

    Raises:
      FileExistsError: there is something at `path`.
      FileNotFoundError, ValueError: `source` does not hold a model, see `load_params`.
    """
    root = pathlib.Path(source)
    cfg = read_config(root, dtype)
    raw, form = read_raw_config(root)
    with contextlib.ExitStack() as stack:
        files = with_prefix(open_tensors(root, stack), form)
        check_tensors(root, files, cfg, form)
        dtypes = tensor_dtypes(cfg, form)

        def read(name: str) -> np.ndarray:
            values: np.ndarray = files[name][:]
            return values.astype(dtypes[name], copy=False)

        with _new_directory(path) as unfinished:
            for file in sorted(root.iterdir()):
                if file.suffix in COPIED and file.name not in ("config.json", INDEX):
                    shutil.copy(file, unfinished)
            key = "dtype" if "dtype" in raw else "torch_dtype"
            written.write_json(unfinished / "config.json", raw | {key: cfg.dtype})
            write_tensors(unfinished, cfg, form, read, shard_bytes)


@contextlib.contextmanager
def _new_directory(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """One beside `path`, which gets its name at the end and vanishes after an error."""
    target = pathlib.Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"path={str(path)!r} must be a new or an empty directory")
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _check_params(params: Params, cfg: ModelConfig) -> None:
    expected, got = leaves_of(abstract_params(cfg))[0], leaves_of(params)[0]
    wrong = [
        f"{leaf}: {_describe(got.get(leaf))} instead of {_describe(expected.get(leaf))}"
        for leaf in sorted(set(expected) | set(got))
        if _describe(got.get(leaf)) != _describe(expected.get(leaf))
    ]
    if wrong:
        raise ValueError(f"params must be those of cfg, but {'; '.join(wrong)}")
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in got.values()):
        raise ValueError(
            "params are spread over several processes: load them in one process to save them"
        )


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"


def plan_files(cfg: ModelConfig, form: Format, shard_bytes: int) -> list[list[str]]:
    """The tensors of each file, none of which is larger than `shard_bytes` if it holds several."""
    files: list[list[str]] = [[]]
    room = shard_bytes
    shapes, dtypes = dict(expected_tensors(cfg, form)), tensor_dtypes(cfg, form)
    for name in sorted(shapes, key=in_order):
        num_bytes = math.prod(shapes[name]) * dtypes[name].itemsize
        if num_bytes > room and files[-1]:
            files.append([])
            room = shard_bytes
        files[-1].append(name)
        room -= num_bytes
    return files


def write_tensors(
    directory: pathlib.Path,
    cfg: ModelConfig,
    form: Format,
    read: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    """Writes the tensors that `read` gives by name, as one file or as several and an index."""
    files = plan_files(cfg, form, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    bar = tqdm(files, desc="writing", unit="file", disable=None)  # shown on terminals
    for number, names in enumerate(bar, start=1):
        file = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {name: read(name) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        written.write_tensors(directory / file, tensors, metadata={"format": "pt"})
    if len(files) > 1:
        about = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.write_json(directory / INDEX, about)


def tensor_dtypes(cfg: ModelConfig, form: Format) -> dict[str, np.dtype]:
    """Of the tensors of a model in a format: its own, but for parameters that have another."""
    dtypes: dict[str, np.dtype] = {}
    for leaf, spec in leaves_of(param_specs(cfg))[0].items():
        key, layers = locate(leaf, cfg)
        dtype = jnp.dtype(spec.dtype or cfg.dtype)
        dtypes |= dict.fromkeys(form.tensors[key].names(layers, cfg), dtype)
    return dtypes


def _entry(leaf: jax.Array | np.ndarray | Apart, index: tuple[int, ...]) -> np.ndarray:
    """leaf[index], brought to the host."""
    if isinstance(leaf, Apart):
        leaf, index = leaf.layer(index[0]), index[1:]
    if isinstance(leaf, jax.Array) and [d.platform for d in leaf.devices()] == ["cpu"]:
        leaf = np.asarray(leaf)  # whole on this one device: no copy, and nothing to compile
    return leaf[index] if isinstance(leaf, np.ndarray) else np.asarray(_take(leaf, *index))


@jax.jit
def _take(leaf: jax.Array, *index: int) -> jax.Array:
    """One compilation per shape, where indexing outside compiles once per index."""
    rest = leaf.shape[len(index) :]
    start = (*index, *(0 for _ in rest))
    return jax.lax.dynamic_slice(leaf, start, (*(1 for _ in index), *rest)).reshape(rest)


def _to_stored(array: np.ndarray, stored: Stored, cfg: ModelConfig) -> np.ndarray:
    ours = stored.ours[1:] if stored.is_per_expert else stored.ours
    order = [ours.index(letter) for letter in "".join(stored.stored)]
    return np.ascontiguousarray(array.transpose(order).reshape(stored.part_shape(cfg)))
