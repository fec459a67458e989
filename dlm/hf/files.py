"""What a published directory says about its model: config.json, and tensors not read yet."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import safetensors
from jax.typing import DTypeLike

from dlm.config import ModelConfig
from dlm.hf.format import TOKEN_IDS, Format
from dlm.hf.formats import FORMATS
from dlm.tokenizer import has_tokenizer, load_tokenizer, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int,),
    "float": (float, int),
    "bool": (bool,),
}


def read_config(path: str | os.PathLike[str], dtype: DTypeLike | None = None) -> ModelConfig:
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
    raw, form = read_raw_config(root)
    file = root / "config.json"

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
    try:
        values |= form.read(raw | {key: values[name] for name, key in form.fields.items()})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if dtype is None:
        dtype = raw.get("torch_dtype") or raw.get("dtype") or _stored_dtype(root, form)
    dtype = "bfloat16" if dtype is None else jnp.dtype(dtype).name
    names = [name for name in TOKEN_IDS if name not in form.implied]
    ids = _read_token_ids(root, raw, names, values["vocab_size"], form)
    cfg = ModelConfig(**values, **form.implied, **ids, dtype=dtype)
    # A model that another family's files could hold as well is written as what it was.
    is_first = next((other for other in FORMATS.values() if not other.refuse(cfg)), form) is form
    return cfg if is_first else dataclasses.replace(cfg, family=form.architecture)


def read_raw_config(root: pathlib.Path) -> tuple[dict[str, Any], Format]:
    """config.json as it stands there, and its format; errors as `read_config`."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"path={str(root)!r} is not a directory: download the model and give its directory"
        )
    file = root / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the directory must hold a published model")
    raw = read_json(file)
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or [None]
    alike = [form for form in FORMATS.values() if form.model_type == model_type]
    if not alike:
        known = dict.fromkeys(form.model_type for form in FORMATS.values())
        raise ValueError(
            f"{file}: model_type={model_type!r} is not supported; "
            f"only {' and '.join(map(repr, known))} are"
        )
    form = FORMATS.get(architectures[0], alike[0])
    if form not in alike:
        raise ValueError(
            f"{file}: architectures={architectures} are of model_type={form.model_type!r}, but "
            f"model_type={model_type!r}: which of both is it?"
        )
    return raw, form


def _read_token_ids(
    root: pathlib.Path, raw: dict[str, Any], names: Sequence[str], vocab_size: int, form: Format
) -> dict[str, Any]:
    generation_file = root / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    tokenizer = load_tokenizer(root) if has_tokenizer(root) else None
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        tokenizer = None  # it belongs to another model, as `dlm.load` will say
    ids: dict[str, Any] = {}
    optional = {"bos_token_id"} if form.has_mask else {"bos_token_id", "mask_token_id"}
    for name in names:
        of_tokenizer = None if tokenizer is None else getattr(tokenizer, name)
        found = [raw.get(name), generation.get(name), of_tokenizer]
        if name == "bos_token_id":
            found.insert(0, of_tokenizer)
        if (default := form.default_ids.get(name, vocab_size)) < vocab_size:
            found.append(default)
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


def _stored_dtype(root: pathlib.Path, form: Format) -> str | None:
    """Of the embedding, where the weights are there."""
    if not any((root / name).is_file() for name in (SINGLE, INDEX)):
        return None
    with contextlib.ExitStack() as stack:
        tensor = open_tensors(root, stack).get(form.tensors["embed"].name)
        return None if tensor is None else DTYPES.get(tensor.get_dtype())


def format_for(cfg: ModelConfig) -> Format:
    """The published format that a model is written in; ValueError if none can hold it."""
    refusals = []
    for form in FORMATS.values():
        if cfg.family not in (None, form.architecture):
            continue
        if (refusal := form.refuse(cfg)) is None:
            return form
        refusals.append(refusal)
    raise ValueError(f"no published format can hold this model: {'; '.join(refusals)}")


def raw_config(cfg: ModelConfig, form: Format) -> dict[str, Any]:
    """What config.json is to hold."""
    raw = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "torch_dtype": cfg.dtype,
        "use_cache": form.is_causal,
        "vocab_size": cfg.vocab_size,
        **form.config_keys(cfg),
        **{name: getattr(cfg, name) for name in TOKEN_IDS if getattr(cfg, name) is not None},
    }
    return dict(sorted(raw.items()))


def open_tensors(root: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A lazy slice per stored tensor; nothing but headers is read."""
    if (root / SINGLE).is_file():
        handle = _open_file(root / SINGLE, stack)
        return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    index = root / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{root} has neither {SINGLE} nor {INDEX}; one must hold weights")
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
