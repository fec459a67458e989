"""Published checkpoints: Hugging Face directories <-> (ModelConfig, params); see `FORMATS`.

A directory holds `config.json` and `model.safetensors`, or several `model-*.safetensors` with
`model.safetensors.index.json`. Every tensor is read straight into the dtype and the sharding in
which it is used, one stacked leaf after the other, so the host never holds the whole model.

Example (from the root of the repository):
    >>> import tempfile
    >>> cfg = read_config("tests/golden/llada_small", dtype="bfloat16")
    >>> params = load_params("tests/golden/llada_small", cfg)
    >>> params["embed"].shape, params["embed"].dtype
    ((96, 64), dtype(bfloat16))
    >>> save_hf(tempfile.mkdtemp() + "/copy", params, cfg)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from dlm.config import ModelConfig, RopeScaling
from dlm.hf_formats import (
    DREAM,
    FORMATS,
    LLADA,
    LLAMA,
    QWEN2,
    QWEN3,
    Format,
    Stored,
    letter_sizes,
)
from dlm.params import Params, abstract_params, param_shardings, param_specs
from dlm.sharding import RULES, Rules
from dlm.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, read_json

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_IDS = ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id")
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,)}


# ---- Configuration ----------------------------------------------------------------------------


def read_config(path: str | os.PathLike[str], dtype: Any = None) -> ModelConfig:
    """The configuration of a published model.

    Token ids that `config.json` does not give are looked up in `generation_config.json`, then in
    the tokenizer's files. The begin token is the tokenizer's first: Dream's `config.json` names
    another one than its tokenizer and its authors use.

    Args:
      path: a directory with `config.json`.
      dtype: such as "bfloat16" or `jnp.float32`; by default the file's, else that of the stored
        embedding, else bfloat16.

    Raises:
      FileNotFoundError: there is no such directory or file.
      ValueError: the file is broken, incomplete, or asks for something that is not implemented.
    """
    root = pathlib.Path(path)
    raw, form = _read_raw_config(root)
    file = root / "config.json"
    if form.is_causal and (rotary := raw.get("rope_parameters")):  # as of transformers 5
        raw = raw | {"rope_theta": rotary.get("rope_theta"), "rope_scaling": rotary}

    for key, (supported, absent) in form.fixed.items():
        value = raw.get(key, absent)
        if value not in supported:
            assumed = "" if key in raw else " (assumed, as the key is absent)"
            raise ValueError(
                f"{file}: {key}={value!r}{assumed} is not supported; "
                f"only {' or '.join(map(repr, supported))} is"
            )

    kinds = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}
    missing = [key for key in form.fields.values() if raw.get(key) is None]
    lacking = [key for key in missing if key not in form.absent]
    if lacking:
        raise ValueError(f"{file} must give {', '.join(lacking)}")
    # Keys that are given come first: the absent ones are computed from them.
    values: dict[str, Any] = {}
    for name, key in sorted(form.fields.items(), key=lambda item: item[1] in missing):
        value = form.absent[key](raw) if key in missing else raw[key]
        kind = _KINDS[kinds[name]]
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            raise ValueError(f"{file}: {key}={value!r} must be of type {kinds[name]}")
        values[name] = value
    if form.is_causal:
        values["rope_scaling"] = _read_rope_scaling(file, raw.get("rope_scaling"))
    if dtype is None:
        dtype = raw.get("torch_dtype") or raw.get("dtype") or _stored_dtype(root, form)
    dtype = "bfloat16" if dtype is None else jnp.dtype(dtype).name
    names = [name for name in _IDS if name not in form.implied]
    ids = _read_token_ids(root, raw, names, values["vocab_size"], form)
    return ModelConfig(**values, **form.implied, **ids, dtype=dtype)


def _read_raw_config(root: pathlib.Path) -> tuple[dict[str, Any], Format]:
    if not root.is_dir():
        raise FileNotFoundError(
            f"path={str(root)!r} is not a directory: download the model and give its directory"
        )
    file = root / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the directory must hold a published model")
    raw = read_json(file)
    if (model_type := raw.get("model_type")) not in FORMATS:
        raise ValueError(
            f"{file}: model_type={model_type!r} is not supported; "
            f"only {' and '.join(map(repr, FORMATS))} are"
        )
    return raw, FORMATS[model_type]


def _read_token_ids(
    root: pathlib.Path, raw: dict[str, Any], names: Sequence[str], vocab_size: int, form: Format
) -> dict[str, Any]:
    generation_file = root / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tokenizer = load_tokenizer(root) if has_tokenizer(root) else None
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        tokenizer = None  # it belongs to another model, as `dlm.load` will say
    ids: dict[str, Any] = {}
    optional = {"bos_token_id", "mask_token_id"} if form.is_causal else {"bos_token_id"}
    for name in names:
        of_tokenizer = None if tokenizer is None else getattr(tokenizer, name)
        found = [raw.get(name), generation.get(name), of_tokenizer]
        if name == "bos_token_id":
            found.insert(0, of_tokenizer)
        value = next((value for value in found if value is not None), None)
        if isinstance(value, list):  # several ends: the tokenizer's one, or the first
            value = of_tokenizer if of_tokenizer in value else value[0]
        if value is None and name == "pad_token_id":
            value = ids["eos_token_id"]
        if not isinstance(value, int) and not (value is None and name in optional):
            raise ValueError(
                f"{root / 'config.json'} must give {name} as an integer, but it, "
                f"generation_config.json and the tokenizer give {value!r}"
            )
        ids[name] = value
    return ids


def _read_rope_scaling(file: pathlib.Path, raw: Any) -> RopeScaling | None:
    """What `rope_scaling` or `rope_parameters` says; None: nothing is stretched."""
    if raw is None:
        return None
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"{file}: rope_scaling of type {kind!r} is not supported; only 'llama3' and 'default' "
            "are"
        )
    names = {"original_max_seq_len": "original_max_position_embeddings"}
    fields = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [key for name in fields if (key := names.get(name, name)) not in raw]
    if missing:
        raise ValueError(f"{file}: rope_scaling must give {', '.join(missing)}")
    return RopeScaling(**{name: raw[names.get(name, name)] for name in fields})


def _stored_dtype(root: pathlib.Path, form: Format) -> str | None:
    """Of the embedding, where the weights are there."""
    if not any((root / name).is_file() for name in (_SINGLE, _INDEX)):
        return None
    with contextlib.ExitStack() as stack:
        tensor = _open_tensors(root, stack).get(form.tensors["embed"].name)
        return None if tensor is None else _DTYPES.get(tensor.get_dtype())


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
    _, form = _read_raw_config(root)
    specs, tree = _flat(param_specs(cfg))
    shardings = _flat(param_shardings(cfg, mesh, rules))[0] if mesh is not None else {}
    with contextlib.ExitStack() as stack:
        files = _open_tensors(root, stack)
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


def _open_tensors(root: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A lazy slice per stored tensor; nothing but headers is read."""
    if (root / _SINGLE).is_file():
        handle = _open_file(root / _SINGLE, stack)
        return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    index = root / _INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{root} has neither {_SINGLE} nor {_INDEX}; one must hold weights")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map from tensors to files")
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (root / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names files that are missing: {', '.join(absent)}")
    handles = {name: _open_file(root / name, stack) for name in files}
    present = {name: set(handle.keys()) for name, handle in handles.items()}
    return {
        name: handles[file].get_slice(name)
        for name, file in weight_map.items()
        if name in present[file]
    }


def _open_file(file: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); download it again"
        ) from error


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
        if kind not in _DTYPES:
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
        _write_json(unfinished / "config.json", _raw_config(cfg, form))
        if tokenizer is not None:
            tokenizer.save(unfinished)
        _write_tensors(unfinished, params, cfg, form, shard_bytes)
        unfinished.replace(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def format_for(cfg: ModelConfig) -> Format:
    """The published format that a model is written in; ValueError if none can hold it."""
    if not cfg.shifted_logits:
        form = LLADA
    elif cfg.qkv_bias:
        form = QWEN2 if cfg.mask_token_id is None else DREAM
    else:
        form = QWEN3 if cfg.qk_norm else LLAMA
    wrong = {"qk_norm": cfg.qk_norm and form is not QWEN3}
    if not form.is_causal:
        wrong["mask_token_id"] = cfg.mask_token_id is None
        wrong["head_dim"] = cfg.head_dim * cfg.n_heads != cfg.d_model
        wrong["rope_scaling"] = cfg.rope_scaling is not None
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"{name}={getattr(cfg, name)} cannot be written: the published LLaDA and Dream "
                "formats (no shifted logits; biases and MASK) have a MASK token, head_dim = "
                "d_model / n_heads, and no rope_scaling; QK norm goes only with shifted logits and "
                "without qkv_bias (Qwen3)"
            )
    return form


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


def _raw_config(cfg: ModelConfig, form: Format) -> dict[str, Any]:
    skipped = () if form.is_causal else ("head_dim",)
    raw = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "torch_dtype": cfg.dtype,
        "use_cache": False,
        "vocab_size": cfg.vocab_size,
        **form.extra,
        **{key: supported[0] for key, (supported, _) in form.fixed.items()},
        **{key: getattr(cfg, name) for name, key in form.fields.items() if name not in skipped},
        **{name: getattr(cfg, name) for name in _IDS if getattr(cfg, name) is not None},
    }
    if (scaling := cfg.rope_scaling) is not None:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return dict(sorted(raw.items()))


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
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {}
        for name in names:
            leaf, layer = sources[name]
            array = np.asarray(leaves[leaf] if layer is None else _layer(leaves[leaf], layer))
            tensors[name] = _to_stored(array, form.tensors[leaf], cfg)
        safetensors.numpy.save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = {"total_size": sum(num_bytes.values())}
        _write_json(directory / _INDEX, {"metadata": total, "weight_map": weight_map})


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
