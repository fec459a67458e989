"""What a published directory says about its model: config.json, and tensors not read yet."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import TOKEN_IDS, Format
from dlm.hf.formats import FORMATS, llada_moe
from dlm.hf.harmless import check_keys
from dlm.hf.tokenizer import has_tokenizer, load_tokenizer
from dlm.json_lines import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_POINTER = b"version https://git-lfs"
MOST_LAYERS = 10_000  # lists of more would fill the memory
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int,),
    "float": (float, int),
    "bool": (bool,),
}


def read_config(
    path: str | os.PathLike[str], dtype: DTypeLike | None = None, raw: dict[str, Any] | None = None
) -> ModelConfig:
    """The configuration of a published model.

    Token ids that `config.json` does not give are looked up in `generation_config.json`, then in
    the tokenizer's files. The begin token is the tokenizer's first: Dream's `config.json` names
    another one than its tokenizer and its authors use. All ends of a text that any of them names
    end one; the tokenizer's is the one that is written.

    Args:
      path: a directory with `config.json`.
      dtype: such as "bfloat16" or `jnp.float32`; by default the file's, else that of the stored
        embedding, else bfloat16.
      raw: what config.json says, as far as it is to be read; None: all of it.

    Raises:
      FileNotFoundError: there is no such directory or file.
      ValueError: the file is broken, incomplete, or asks for something that is not implemented.
    """
    root = pathlib.Path(path)
    file = root / "config.json"
    if raw is None:
        raw, form = read_raw_config(root)
    else:
        form = format_of(file, raw)
    known = (*form.fields.values(), *form.fixed, *form.absent, *form.extra, *form.keys)
    check_keys(file, raw, {*known, *TOKEN_IDS})

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
        try:
            given: Any = form.absent[key](raw) if key in missing else raw[key]
        except ValueError as error:  # it follows from a key that is wrong
            raise ValueError(f"{file}: {error}") from error
        kind = _KINDS[kinds[name]]
        if not isinstance(given, kind) or (isinstance(given, bool) and bool not in kind):
            raise ValueError(f"{file}: {key}={given!r} must be of type {kinds[name]}")
        if isinstance(given, int) and kinds[name] == "int" and given < 1:
            raise ValueError(f"{file}: {key}={given} must be at least 1")
        if isinstance(given, float) and not math.isfinite(given):
            raise ValueError(f"{file}: {key}={given!r} must be finite")
        if name == "n_layers" and isinstance(given, int) and given > MOST_LAYERS:
            raise ValueError(f"{file}: {key}={given} must be at most {MOST_LAYERS}")
        if isinstance(given, int) and given > keys.LARGEST:
            raise ValueError(f"{file}: {key}={given!r:.60} must be at most {keys.LARGEST}")
        values[name] = given
    words = {**keys.WORDS, **form.fields}
    nested = [value for value in raw.values() if isinstance(value, dict)]
    said = {key for part in (raw, *nested) for key, value in part.items() if value is not None}
    try:
        values |= form.read(raw | {key: values[name] for name, key in form.fields.items()})
    except ValueError as error:
        raise ValueError(f"{file}: {keys.in_their_words(error, words, said)}") from error
    if dtype is None:
        dtype = _said_dtype(file, raw) or _stored_dtype(root, form) or "bfloat16"
    try:
        dtype = jnp.dtype(dtype).name
    except TypeError as error:
        raise ValueError(
            f"dtype={dtype!r} must be 'float32', 'bfloat16', 'float16' or 'float64'"
        ) from error
    names = [name for name in TOKEN_IDS if name not in form.implied]
    ids = _read_token_ids(root, raw, names, values["vocab_size"], form)
    never_causal = form.has_mask is True
    try:
        cfg = ModelConfig(**values, **form.implied, **ids, never_causal=never_causal, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{file}: {keys.in_their_words(error, words, said)}") from error
    return with_family(cfg, form)


def with_family(cfg: ModelConfig, form: Format) -> ModelConfig:
    """A model that another family's files could hold as well is written as what it was."""
    is_first = next((other for other in FORMATS.values() if not other.refuse(cfg)), form) is form
    if is_first or form.refuse(cfg) is not None:
        return cfg
    return dataclasses.replace(cfg, family=form.architecture)


def read_raw_config(root: pathlib.Path) -> tuple[dict[str, Any], Format]:
    """config.json as it stands there, and its format; errors as `read_config`."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"path={str(root)!r} is not a directory: download the model and give its directory"
        )
    file = root / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the directory must hold a published model{instead(root)}"
        )
    raw = read_json(file)
    return raw, format_of(file, raw)


# What a directory may hold instead of what is read, and what to do then.
_INSTEAD = {
    "*.gguf": "give that file itself",
    "model-*-of-*.safetensors": f"{INDEX} says which tensors are where: download it too",
    "adapter_config.json": "it is an adapter, which dlm.lora.load reads for a model",
    "pytorch_model*.bin*": "weights are read as safetensors, which save_pretrained writes",
    "consolidated*": "it is in its authors' layout: get the one for transformers",
    "*.pt": "weights are read as safetensors",
    "*.pth": "weights are read as safetensors",
    "*.msgpack": "weights are read as safetensors",
    "*.h5": "weights are read as safetensors",
    "*.onnx": "weights are read as safetensors",
}


def instead(root: pathlib.Path) -> str:
    """The end of a sentence that says what a directory lacks."""
    for pattern, advice in _INSTEAD.items():
        if found := sorted(root.glob(pattern)):
            return f"; it has {found[0].name}: {advice}"
    return ""


# Other names of the same network.
_ALSO = {"LLaMAForCausalLM": "LlamaForCausalLM"}

# How names of networks with a head end, where those of their layers end in "Model".
_HEAD = re.compile("(ForCausalLM|ModelLM|LMHeadModel)$")


def format_of(file: pathlib.Path, raw: dict[str, Any]) -> Format:
    """The format of a config.json: what `architectures` and `auto_map` name, of its `model_type`.

    Several networks share a `model_type`, so those names count; without any it is the first of them
    in `FORMATS`. `AutoModel` may be the layers of that network, without its head.

    Raises:
      ValueError: it is not supported.
    """
    model_type = raw.get("model_type")
    forms = {form.architecture: form for form in FORMATS.values() if form.model_type == model_type}
    if model_type == "lladamoe":  # what a public trainer makes of "llada", to tell the two apart
        forms = {llada_moe.FORMAT.architecture: llada_moe.FORMAT}
    if not forms:
        types = dict.fromkeys(form.model_type for form in FORMATS.values())
        raise ValueError(
            f"{file}: model_type={model_type!r} is not supported; "
            f"only {' and '.join(map(repr, types))} are"
        )
    listed, code = raw.get("architectures") or [], raw.get("auto_map") or {}
    if not isinstance(listed, list) or not isinstance(code, dict):
        raise ValueError(
            f"{file}: architectures={listed!r:.60} must be a list, and auto_map={code!r:.60} an "
            "object"
        )
    names = [(f"architectures={listed!r}", _ALSO.get(str(name), str(name))) for name in listed]
    known = {name for _, name in names}
    for key in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel"):
        if (said := code.get(key)) is None:
            continue
        name = str(said).rpartition(".")[2]
        name = _ALSO.get(name, name)
        if key != "AutoModel" or name not in {_HEAD.sub("Model", one) for one in known}:
            names.append((f"auto_map[{key!r}]={said!r}", name))
            known.add(name)
    for said, name in names:
        if name not in forms:
            raise ValueError(
                f"{file}: {said} is not supported; with model_type={model_type!r} only "
                f"{' and '.join(map(repr, forms))} are"
            )
    if len(different := sorted(known)) > 1:
        raise ValueError(
            f"{file}: architectures and auto_map must name one network, not "
            f"{' and '.join(map(repr, different))}"
        )
    return forms[different[0]] if different else next(iter(forms.values()))


def _read_token_ids(
    root: pathlib.Path, raw: dict[str, Any], names: Sequence[str], vocab_size: int, form: Format
) -> dict[str, Any]:
    """The token ids of `ModelConfig`, of which `names` are to be read."""
    generation_file = root / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    files = {root / "config.json": raw, generation_file: generation}
    tokenizer, why_not = None, ""
    try:
        tokenizer = load_tokenizer(root) if has_tokenizer(root) else None
    except (OSError, ValueError) as error:  # it matters only if an id is missing
        why_not = f", which cannot be read: {error}"

    def said(name: str) -> list[int]:
        """What the files say."""
        ids = [(file, i) for file in files for i in _token_ids(file, name, files[file].get(name))]
        for file, i in ids:
            if name != "pad_token_id" and not 0 <= i < vocab_size:
                size = f"{form.fields['vocab_size']}={vocab_size}"
                raise ValueError(f"{file}: {name}={i} must be in [0, {size})")
        return [i for _, i in ids]

    masks = said("mask_token_id")[:1]

    def found(name: str) -> list[int]:
        """What the files say, and the tokenizer."""
        own: int | None = None if tokenizer is None else getattr(tokenizer, name)
        # A token that has no row in the embedding, or is MASK, is not what the tokenizer says.
        is_mask = name == "eos_token_id" and own in masks
        ours = [] if own is None or own >= vocab_size or is_mask else [own]
        is_first = name in ("bos_token_id", "eos_token_id")
        every = ours + said(name) if is_first else said(name) + ours
        default = form.default_ids.get(name, vocab_size)
        return every or ([default] if default < vocab_size else [])

    ids: dict[str, Any] = {name: next(iter(found(name)), None) for name in names}
    ids["more_eos_ids"] = tuple(found("eos_token_id"))
    if "pad_token_id" in names:  # nothing sees it: one that cannot be, such as -1, is as none
        unfit = {ids.get("mask_token_id"), form.implied.get("mask_token_id")}
        pads = (i for i in found("pad_token_id") if 0 <= i < vocab_size and i not in unfit)
        ids["pad_token_id"] = next(pads, ids["eos_token_id"])
    optional = {"bos_token_id"} | (set() if form.has_mask else {"mask_token_id"})
    for name in names:
        if ids[name] is None and name not in optional:
            raise ValueError(
                f"{root / 'config.json'} must give {name}, which neither it nor "
                f"generation_config.json nor the tokenizer does{why_not}"
            )
    return ids


def _token_ids(file: pathlib.Path, name: str, value: Any) -> list[int]:
    """One token id of a file, or several of them (ends of a text), or none, as a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    may_be_several = name == "eos_token_id"
    if any(type(i) is not int for i in ids) or (isinstance(value, list) and not may_be_several):
        kind = "an integer or a list of integers" if may_be_several else "an integer"
        raise ValueError(f"{file}: {name}={value!r} must be {kind}")
    return ids


def _said_dtype(file: pathlib.Path, raw: dict[str, Any]) -> str | None:
    """Of config.json; None: it does not say, or says that the weights do."""
    found = {key: raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    if len(set(map(str, found.values()))) > 1:
        raise ValueError(f"{file}: {found} must say the same: leave one of them out")
    for key, value in found.items():
        name = str(value).removeprefix("torch.")
        if name == "auto":
            return None
        if name not in DTYPES.values():
            raise ValueError(
                f"{file}: {key}={value!r} is not supported; only 'auto' and "
                f"{', '.join(map(repr, DTYPES.values()))} are"
            )
        return name
    return None


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
        **token_ids(cfg),
    }
    return dict(sorted(raw.items()))


def token_ids(cfg: ModelConfig) -> dict[str, Any]:
    """Token ids as config.json and generation_config.json give them; several ends are a list."""
    ids = {name: getattr(cfg, name) for name in TOKEN_IDS if getattr(cfg, name) is not None}
    return ids | ({"eos_token_id": list(cfg.eos_ids)} if cfg.more_eos_ids else {})


def open_tensors(root: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """A lazy slice per stored tensor; nothing but headers is read."""
    if (root / SINGLE).is_file():
        handle = _open_file(root / SINGLE, stack)
        return {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
    index = root / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{root} has neither {SINGLE} nor {INDEX}; one must hold weights{instead(root)}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map from tensors to files")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map must name a file for every tensor")
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not (root / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names files that are missing: {', '.join(absent)}")
    handles = {name: _open_file(root / name, stack) for name in files}
    held = [(name, file) for file, handle in handles.items() for name in handle.keys()]  # noqa: SIM118
    # What the index does not list is seen, too.
    found = {
        name: handles[file].get_slice(name)
        for name, file in held
        if weight_map.get(name, file) == file
    }
    if len(found) < len(held):
        for name, file in held:
            if name in found and not is_same(found[name], handles[file].get_slice(name)):
                raise ValueError(f"{root}: {name} is there twice, with other numbers in {file}")
    return found


def is_same(x: Any, y: Any) -> bool:
    """Whether two tensors of `open_tensors` hold the same; memory holds few rows of them."""
    shape = list(x.get_shape())
    if shape != list(y.get_shape()):
        return False
    if not {x.get_dtype(), y.get_dtype()} <= set(DTYPES) or not shape:
        return True  # which are refused, whatever they hold
    ends = [*range(0, shape[0], 4096), shape[0]]
    return all(np.array_equal(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends))


def read_tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of one file, by name.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is broken.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it must hold weights")
    with contextlib.ExitStack() as stack:
        handle = _open_file(file, stack)
        names = list(handle.keys())
        kinds = {name: handle.get_slice(name).get_dtype() for name in names}
        if wrong := [f"{name} {kind}" for name, kind in kinds.items() if kind not in DTYPES]:
            raise ValueError(f"{file}: {wrong[0]} must be a float: {', '.join(DTYPES)}")
        return {name: handle.get_tensor(name) for name in names}


def _open_file(file: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="numpy"))
    except safetensors.SafetensorError as error:
        with file.open("rb") as handle:
            is_pointer = handle.read(len(_POINTER)) == _POINTER
        how = (
            "it is a pointer, which `git lfs pull` replaces" if is_pointer else "download it again"
        )
        raise ValueError(f"{file} is not a complete safetensors file ({error}); {how}") from error
