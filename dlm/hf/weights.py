"""Published checkpoints: Hugging Face directories <-> (ModelConfig, params); see `dlm.hf.formats`.

A directory holds `config.json` and `model.safetensors`, or several `model-*.safetensors` with
`model.safetensors.index.json`. Every tensor is read straight into the dtype and the sharding in
which it is used, one shard of a stacked leaf after the other, so the host never holds the model.

Example (from the root of the repository):
    >>> import tempfile
    >>> from dlm.hf.files import read_config
    >>> from dlm.hf.saving import save_hf
    >>> cfg = read_config("tests/golden/llada_small", dtype="bfloat16")
    >>> params = load_params("tests/golden/llada_small", cfg)
    >>> params["embed"].shape, params["embed"].dtype
    ((96, 64), dtype(bfloat16))
    >>> save_hf(tempfile.mkdtemp() + "/copy", params, cfg)
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm.config import ModelConfig
from dlm.hf.files import (
    DTYPES,
    is_same,
    open_tensors,
    read_raw_config,
)
from dlm.hf.format import Format, Stored, letter_sizes, locate
from dlm.params import (
    Params,
    is_apart,
    laid_apart,
    param_shardings,
    param_specs,
)
from dlm.sharding import RULES, Rules

# How names of tensors end that only quantised models have.
QUANTISED = (
    *(".absmax", ".g_idx", ".input_scale", ".quant_map", ".qweight", ".qzeros", ".scales", ".SCB"),
    *(".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", "_blocks"),
)


def load_params(
    path: str | os.PathLike[str],
    cfg: ModelConfig,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    apart: bool = False,
) -> Params:
    """The parameters of a published model, as `param_specs(cfg)`.

    Args:
      path: a directory that `read_config` can read.
      cfg: what `read_config` gave, maybe with another dtype.
      mesh: where to put them; each process and device reads its own shards only. None: on the
        default device.
      rules: logical axes to mesh axes.
      apart: whether what can is `Apart`, which goes without a mesh.

    Returns:
      The parameters in `cfg.dtype`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is broken, or the tensors are not those of `cfg`; all that are missing,
        unexpected or of another shape or type are listed.
    """
    root = pathlib.Path(path)
    _, form = read_raw_config(root)
    with contextlib.ExitStack() as stack:
        files = with_prefix(open_tensors(root, stack), form)
        check_tensors(root, files, cfg, form)
        return read_params(files, cfg, form, mesh, rules, apart)


def read_params(
    files: Mapping[str, Any],
    cfg: ModelConfig,
    form: Format,
    mesh: Mesh | None,
    rules: Rules,
    apart: bool,
) -> Params:
    """The parameters in tensors that passed `check_tensors`, one leaf after the other."""
    specs, tree = leaves_of(param_specs(cfg))
    shardings = leaves_of(param_shardings(cfg, mesh, rules))[0] if mesh is not None else {}

    def reader(leaf: str) -> Callable[[tuple[range, ...]], np.ndarray]:
        key, layers = locate(leaf, cfg)
        dtype = jnp.dtype(specs[leaf].dtype or cfg.dtype)
        return functools.partial(_read_leaf, files, form.tensors[key], cfg, layers, dtype)

    def load_layers(leaf: str) -> Iterator[np.ndarray]:
        read, (L, *rest) = reader(leaf), specs[leaf].shape
        return (read((range(i, i + 1), *map(range, rest)))[0] for i in range(L))

    def load_leaf(leaf: str) -> jax.Array:
        read, shape = reader(leaf), specs[leaf].shape
        if mesh is None:
            return jax.device_put(read(tuple(map(range, shape))))
        sharding, placed = shardings[leaf], []
        first: dict[tuple[range, ...], jax.Array] = {}  # replicas are read once
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None  # it is, for arrays without extended dtypes
            part = tuple(range(*axis.indices(dim)) for axis, dim in zip(index, shape, strict=True))
            values: jax.Array | np.ndarray | None = first.get(part)
            if values is None:
                values = read(part)
            # One shard after the other, so that no more than one waits on the host.
            placed.append(jax.device_put(values, device).block_until_ready())
            first.setdefault(part, placed[-1])
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)

    if apart:
        return laid_apart(param_specs(cfg), load_leaf, load_layers)
    return jax.tree.unflatten(tree, [load_leaf(leaf) for leaf in specs])


def leaves_of(tree: Params) -> tuple[dict[str, Any], Any]:
    """{path: leaf} in the tree's order, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_apart)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    return named, structure


def in_order(name: str) -> list[tuple[int, str]]:
    """Sorts names of tensors: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def check_tensors(
    root: pathlib.Path, files: Mapping[str, Any], cfg: ModelConfig, form: Format
) -> None:
    """ValueError unless the tensors of a directory, of `open_tensors`, are those of `cfg`."""
    _refuse_quantised(root, files)
    expected = dict(expected_tensors(cfg, form))
    harmless = set(form.ignored)
    if cfg.tie_embeddings:
        harmless.add(_head(form))  # the embedding once more
    missing = [
        f"{name} {list(expected[name])}"
        for name in sorted(set(expected) - set(files), key=in_order)
    ]
    unexpected = [
        f"{name} {files[name].get_shape()}"
        for name in sorted(set(files) - set(expected), key=in_order)
        if not name.endswith(tuple(harmless))
    ]
    wrong = []
    for name in sorted(set(files) & set(expected), key=in_order):
        shape, kind = files[name].get_shape(), files[name].get_dtype()
        if tuple(shape) != expected[name]:
            wrong.append(f"{name} {shape} instead of {list(expected[name])}")
        if kind not in DTYPES:
            wrong.append(f"{name} {kind} instead of a float")
    lists = {"missing": missing, "unexpected": unexpected, "not as expected": wrong}
    lists = {what: names for what, names in lists.items() if names}
    if lists:
        found = "; ".join(_list(what, names, 10 // len(lists)) for what, names in lists.items())
        hint = ""
        if lists == {"missing": missing} and set(expected) - set(files) == {_head(form)}:
            hint = f"; {_tying(form)} must be true if it is the embedding"
        if "fc.weight" in files:
            hint = "; EAGLE's draft networks are read by dlm.heads.eagle_1 and eagle_3"
        raise ValueError(
            f"{root} does not hold the tensors of this {form.model_type}: {found}{hint}"
        )
    _check_tied(root, files, cfg, form)


def _list(what: str, names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what}: {', '.join(names[:most])}{more}"


def _head(form: Format) -> str:
    """The tensor that makes logits."""
    return form.tensors["unembed"].name


def _tying(form: Format) -> str:
    """The key that says whether that is the embedding."""
    return form.fields.get("tie_embeddings", "tie_word_embeddings")


def _refuse_quantised(root: pathlib.Path, files: Mapping[str, Any]) -> None:
    """ValueError if there are tensors of a quantised model."""
    for name in sorted(files, key=in_order):
        if name.endswith(QUANTISED) or ".quant_state." in name:
            raise ValueError(
                f"{root}: the weights are quantised, as {name} shows, and only floats are read: "
                "download the model as it was before, or a GGUF of it"
            )


def _check_tied(
    root: pathlib.Path, files: Mapping[str, Any], cfg: ModelConfig, form: Format
) -> None:
    """ValueError if a model whose head is its embedding stores another head."""
    head, embed = _head(form), form.tensors["embed"].name
    if not cfg.tie_embeddings or head not in files:
        return
    if not is_same(files[embed], files[head]):
        raise ValueError(
            f"{root / 'config.json'}: {_tying(form)} says that {head} is {embed}, but another one "
            f"is stored: it must be false, or {head} taken out"
        )


def with_prefix(files: Mapping[str, Any], form: Format) -> Mapping[str, Any]:
    """The tensors under the names of the format, the prefix of which a file may leave out."""
    unembed = form.tensors["unembed"].name
    if not form.prefix or any(name.startswith(form.prefix) for name in files):
        return files
    return {name if name == unembed else form.prefix + name: files[name] for name in files}


def expected_tensors(cfg: ModelConfig, form: Format) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a model in a format; those of several leaves repeat."""
    for leaf in leaves_of(param_specs(cfg))[0]:
        key, layers = locate(leaf, cfg)
        if key not in form.tensors:
            raise ValueError(f"the {form.model_type} format has no tensor for {leaf}")
        stored = form.tensors[key]
        for name in stored.names(layers, cfg):
            yield name, stored.shape(cfg)


def _read_leaf(
    files: Mapping[str, Any],
    stored: Stored,
    cfg: ModelConfig,
    layers: tuple[int, ...],
    dtype: Any,
    part: tuple[range, ...],
) -> np.ndarray:
    """A part of one of our leaves; `part` says which range of each dimension."""
    if "{}" not in stored.name:
        return _read_tensor(files[stored.name], stored, cfg, part).astype(dtype, copy=False)
    out = _aligned([len(axis) for axis in part], dtype)
    for row, number in enumerate(part[0]):
        if stored.is_per_expert:
            for column, expert in enumerate(part[1]):
                tensor = files[stored.name.format(layers[number], expert=expert)]
                out[row, column] = _read_tensor(tensor, stored, cfg, part[2:], stored.ours[1:])
        else:
            tensor = files[stored.name.format(layers[number])]
            out[row] = _read_tensor(tensor, stored, cfg, part[1:])
    return out


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array that begins where JAX wants arrays to, so that on CPU it is used and not copied."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(num_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + num_bytes].view(dtype).reshape(shape)


def _read_tensor(
    tensor: Any,
    stored: Stored,
    cfg: ModelConfig,
    part: tuple[range, ...],
    ours: str | None = None,
) -> np.ndarray:
    """A part of one tensor in our order of dimensions, in the file's dtype; reads no more."""
    ours = stored.ours if ours is None else ours
    size, wanted = letter_sizes(cfg), dict(zip(ours, part, strict=True))
    read: list[slice] = []  # per dimension of the file
    shape: list[int] = []  # per letter, of what is read
    keep: list[slice] = []  # per letter: read whole where a dimension's inner letter is cut
    for axis, group in enumerate(stored.stored):
        outer, inner = group[0], group[1:]
        stride = math.prod(size[letter] for letter in inner)
        start = stored.start(cfg) if axis == stored.axis else 0
        first, stop = (start + end * stride for end in (wanted[outer].start, wanted[outer].stop))
        read.append(slice(first, stop))
        shape += [len(wanted[outer]), *(size[letter] for letter in inner)]
        keep += [slice(None), *(slice(wanted[i].start, wanted[i].stop) for i in inner)]
    values = tensor[tuple(read)].reshape(shape)[tuple(keep)]
    letters = "".join(stored.stored)
    return values.transpose([letters.index(letter) for letter in ours])
