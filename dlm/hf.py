"""Published checkpoints: Hugging Face directories <-> (ModelConfig, params); see `FORMATS`.

A directory holds `config.json` and `model.safetensors`, or several `model-*.safetensors` with
`model.safetensors.index.json`. Every tensor is read straight into the dtype and the sharding in
which it is used, one stacked leaf after the other, so the host never holds the whole model.

Example (from the root of the repository):
    >>> import tempfile
    >>> from dlm.hf_files import read_config
    >>> cfg = read_config("tests/golden/llada_small", dtype="bfloat16")
    >>> params = load_params("tests/golden/llada_small", cfg)
    >>> params["embed"].shape, params["embed"].dtype
    ((96, 64), dtype(bfloat16))
    >>> save_hf(tempfile.mkdtemp() + "/copy", params, cfg)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from dlm.config import ModelConfig
from dlm.hf_files import (
    DTYPES,
    INDEX,
    SINGLE,
    format_for,
    open_tensors,
    raw_config,
    read_raw_config,
)
from dlm.hf_formats import Format, Stored, letter_sizes
from dlm.params import Params, abstract_params, param_shardings, param_specs
from dlm.sharding import RULES, Rules
from dlm.tokenizer import Tokenizer

# ---- Loading ----------------------------------------------------------------------------------


def load_params(
    path: str | os.PathLike[str], cfg: ModelConfig, mesh: Mesh | None = None, rules: Rules = RULES
) -> Params:
    """The parameters of a published model, as `param_specs(cfg)`.

    Args:
      path: a directory that `read_config` can read.
      cfg: what `read_config` gave, maybe with another dtype.
      mesh: where to put them; each process and device reads its own shards only. None: on the
        default device.
      rules: logical axes to mesh axes.

    Returns:
      The parameters in `cfg.dtype`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is broken, or the tensors are not those of `cfg`; all that are missing,
        unexpected or of another shape or type are listed.
    """
    root = pathlib.Path(path)
    _, form = read_raw_config(root)
    specs, tree = _flat(param_specs(cfg))
    shardings = _flat(param_shardings(cfg, mesh, rules))[0] if mesh is not None else {}
    with contextlib.ExitStack() as stack:
        files = open_tensors(root, stack)
        _check_tensors(root, files, cfg, form)

        def load_leaf(leaf: str) -> jax.Array:
            stored, shape = form.tensors[leaf], specs[leaf].shape
            if mesh is None:
                whole = tuple(range(dim) for dim in shape)
                return jnp.asarray(_read_leaf(files, stored, cfg, whole))
            shards: dict[tuple[range, ...], np.ndarray] = {}  # replicas are read once

            def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None  # it is, for arrays without extended dtypes
                part = tuple(
                    range(*axis.indices(dim)) for axis, dim in zip(index, shape, strict=True)
                )
                if part not in shards:
                    shards[part] = _read_leaf(files, stored, cfg, part)
                return shards[part]

            return jax.make_array_from_callback(shape, shardings[leaf], read_shard)

        # One leaf after the other, so that no more than one waits on the host to be copied.
        return jax.tree.unflatten(tree, [load_leaf(leaf).block_until_ready() for leaf in specs])


def _flat(tree: Params) -> tuple[dict[str, Any], Any]:
    """{path: leaf} in the tree's order, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    return named, structure


def _check_tensors(
    root: pathlib.Path, files: Mapping[str, Any], cfg: ModelConfig, form: Format
) -> None:
    expected = dict(_expected_tensors(cfg, form))
    harmless = {"rotary_emb.inv_freq"}  # a constant that old files carry
    if cfg.tie_embeddings:
        harmless.add(form.tensors["unembed"].name)  # the embedding once more
    missing = [
        f"{name} {list(expected[name])}"
        for name in sorted(set(expected) - set(files), key=_natural)
    ]
    unexpected = [
        f"{name} {files[name].get_shape()}"
        for name in sorted(set(files) - set(expected), key=_natural)
        if not name.endswith(tuple(harmless))
    ]
    wrong = []
    for name in sorted(set(files) & set(expected), key=_natural):
        shape, kind = files[name].get_shape(), files[name].get_dtype()
        if tuple(shape) != expected[name]:
            wrong.append(f"{name} {shape} instead of {list(expected[name])}")
        if kind not in DTYPES:
            wrong.append(f"{name} {kind} instead of a float")
    if missing or unexpected or wrong:
        lists = {"missing": missing, "unexpected": unexpected, "not as expected": wrong}
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names)
        raise ValueError(f"{root} does not hold the tensors of this {form.model_type}: {found}")


def _expected_tensors(cfg: ModelConfig, form: Format) -> Iterator[tuple[str, tuple[int, ...]]]:
    for leaf in _flat(param_specs(cfg))[0]:
        if leaf not in form.tensors:
            raise ValueError(f"the {form.model_type} format has no tensor for {leaf}")
        stored = form.tensors[leaf]
        for layer in range(cfg.n_layers) if "{}" in stored.name else (0,):
            yield stored.name.format(layer), stored.shape(cfg)


def _read_leaf(
    files: Mapping[str, Any], stored: Stored, cfg: ModelConfig, part: tuple[range, ...]
) -> np.ndarray:
    """A part of one of our leaves, in `cfg.dtype`; `part` says which range of each dimension."""
    if "{}" not in stored.name:
        return _read_tensor(files[stored.name], stored, cfg, part).astype(cfg.jnp_dtype, copy=False)
    out = np.empty([len(axis) for axis in part], cfg.jnp_dtype)
    for row, layer in enumerate(part[0]):
        out[row] = _read_tensor(files[stored.name.format(layer)], stored, cfg, part[1:])
    return out


def _read_tensor(
    tensor: Any, stored: Stored, cfg: ModelConfig, part: tuple[range, ...]
) -> np.ndarray:
    """A part of one tensor in our order of dimensions, in the file's dtype; reads no more."""
    size, wanted = letter_sizes(cfg), dict(zip(stored.ours, part, strict=True))
    read: list[slice] = []  # per dimension of the file
    shape: list[int] = []  # per letter, of what is read
    keep: list[slice] = []  # per letter: read whole where a dimension's inner letter is cut
    for group in stored.stored:
        outer, inner = group[0], group[1:]
        stride = math.prod(size[letter] for letter in inner)
        read.append(slice(wanted[outer].start * stride, wanted[outer].stop * stride))
        shape += [len(wanted[outer]), *(size[letter] for letter in inner)]
        keep += [slice(None), *(slice(wanted[i].start, wanted[i].stop) for i in inner)]
    values = tensor[tuple(read)].reshape(shape)[tuple(keep)]
    letters = "".join(stored.stored)
    return values.transpose([letters.index(letter) for letter in stored.ours])


# ---- Saving -----------------------------------------------------------------------------------


def save_hf(
    path: str | os.PathLike[str],
    params: Params,
    cfg: ModelConfig,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model in the published format that can hold it, see `format_for`.

    Everything is written to a directory beside `path` that gets its name at the very end, so an
    interrupted save never looks like a model.

    Args:
      path: the directory to make; it must not exist, or be empty.
      params: as `abstract_params(cfg)`.
      cfg: the model.
      tokenizer: written too, if given.
      shard_bytes: largest file, except for single tensors above it; beyond it the model goes to
        several files and an index.

    Raises:
      FileExistsError: there is something at `path`.
      ValueError: no published format can express `cfg`, or the parameters are not its own.
    """
    target = pathlib.Path(path).absolute()
    form = format_for(cfg)
    _check_params(params, cfg)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"path={str(path)!r} must be a new or an empty directory")
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write_json(unfinished / "config.json", raw_config(cfg, form))
        if tokenizer is not None:
            tokenizer.save(unfinished)
        _write_tensors(unfinished, params, cfg, form, shard_bytes)
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _check_params(params: Params, cfg: ModelConfig) -> None:
    expected, got = _flat(abstract_params(cfg))[0], _flat(params)[0]
    wrong = [
        f"{leaf}: {_describe(got.get(leaf))} instead of {_describe(expected.get(leaf))}"
        for leaf in sorted(set(expected) | set(got))
        if _describe(got.get(leaf)) != _describe(expected.get(leaf))
    ]
    if wrong:
        raise ValueError(f"params must be those of cfg, but {'; '.join(wrong)}")
    if not all(getattr(leaf, "is_fully_addressable", True) for leaf in got.values()):
        raise ValueError(
            "params are spread over several processes: load them in one process to save them"
        )


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"


def _write_tensors(
    directory: pathlib.Path, params: Params, cfg: ModelConfig, form: Format, shard_bytes: int
) -> None:
    leaves = _flat(params)[0]
    sources = {  # tensor -> (leaf, layer)
        stored.name.format(layer): (leaf, layer)
        for leaf, stored in form.tensors.items()
        if leaf in leaves
        for layer in (range(cfg.n_layers) if "{}" in stored.name else (None,))
    }
    shapes = dict(_expected_tensors(cfg, form))
    num_bytes = {name: math.prod(shapes[name]) * cfg.jnp_dtype.itemsize for name in sources}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(sources, key=_natural):
        if num_bytes[name] > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= num_bytes[name]

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            leaf, layer = sources[name]
            array = np.asarray(leaves[leaf] if layer is None else _layer(leaves[leaf], layer))
            tensors[name] = _to_stored(array, form.tensors[leaf], cfg)
        safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = {"total_size": sum(num_bytes.values())}
        _write_json(directory / INDEX, {"metadata": total, "weight_map": weight_map})


@jax.jit
def _layer(leaf: jax.Array, layer: int) -> jax.Array:
    """One compilation per shape; indexing outside would compile once per layer."""
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _to_stored(array: np.ndarray, stored: Stored, cfg: ModelConfig) -> np.ndarray:
    order = [stored.ours.index(letter) for letter in "".join(stored.stored)]
    return np.ascontiguousarray(array.transpose(order).reshape(stored.shape(cfg)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _write_json(file: pathlib.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
