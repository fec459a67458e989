"""Draft networks in the layout of the public codes: safetensors, matrices output-first.

Names are a dict from our path of a parameter to the tensor's. Beside the tensors there is a
config.json, whose sizes are those of a Llama or Qwen3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.files import DTYPES, SINGLE, open_tensors, read_config, token_ids
from dlm.hf.format import TOKEN_IDS
from dlm.hf.formats import qwen2
from dlm.hf.rope import write_rope
from dlm.json_lines import read_json
from dlm.params import Params
from dlm.written import write_json, write_tensors

_INTEGERS = ("I64", "I32", "I16", "U8", "I8", "BOOL")  # tables of tokens
_OUTPUT_FIRST = (
    *("fc", "attention/o", "mlp/gate", "mlp/up", "mlp/down"),
    *("_conv/projection", "selector/hidden"),
)


def published_layer(prefix: str, cfg: ModelConfig | None = None) -> dict[str, str]:
    """Names of a decoder layer's tensors, by ours; norms before attention are another matter.

    Args:
      prefix: of theirs.
      cfg: says which biases and norms of heads there are; None: none.
    """
    names = {f"attention/{x}": f"{prefix}.self_attn.{x}_proj.weight" for x in "qkvo"}
    names |= {f"mlp/{x}": f"{prefix}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    names |= {"mlp_norm": f"{prefix}.post_attention_layernorm.weight"}
    if cfg is None:
        return names
    if cfg.qk_norm:
        names |= {f"attention/{x}_norm": f"{prefix}.self_attn.{x}_norm.weight" for x in "qk"}
    biased = ("qkv" if cfg.qkv_bias else "") + ("o" if cfg.o_bias else "")
    names |= {f"attention/{x}_bias": f"{prefix}.self_attn.{x}_proj.bias" for x in biased}
    if cfg.mlp_bias:
        names |= {f"mlp/{x}_bias": f"{prefix}.mlp.{x}_proj.bias" for x in ("gate", "up", "down")}
    return names


# ---- config.json -------------------------------------------------------------------------------

# What of it counts; the rest of a network's layers is the target's, or plain.
_OF_LAYERS = (
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "norm_eps"),
    *("rope_theta", "rope_scaling", "rotary_dim", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"),
    "tie_embeddings",
)


def read_network(path: str | pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """config.json of a directory, and what it says.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is broken.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it says what network the directory holds")
    return file, read_json(file)


def read_architectures(
    file: pathlib.Path, raw: Mapping[str, Any], known: Collection[str]
) -> list[str]:
    """`architectures` of a config.json; ValueError unless all of them are known."""
    kinds = raw.get("architectures") or []
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise ValueError(
            f"{file}: architectures={kinds!r} is not supported; only "
            f"{', '.join(map(repr, known))} are"
        )
    return kinds


def read_section(
    file: pathlib.Path, raw: Mapping[str, Any], name: str, known: Collection[str]
) -> dict[str, Any]:
    """What a config.json says of the network in a section; {} if it is not there.

    Raises:
      ValueError: it is no object, or has another key than the known ones.
    """
    said = raw.get(name) or {}
    if not isinstance(said, dict):
        raise ValueError(f"{file}: {name}={said!r:.60} must be an object")
    if unknown := [key for key in said if key not in known]:
        raise ValueError(
            f"{file}: {name} has {unknown[0]}={said[unknown[0]]!r}, which is not known here "
            "and may change what the network computes; without effect, take it out"
        )
    return said


def read_layers(file: pathlib.Path, raw: Mapping[str, Any], target: ModelConfig) -> ModelConfig:
    """Layers of a network beside `target`, as a config.json describes them.

    Args:
      file: for messages, and where it lies.
      raw: what it says of the layers, without what belongs to the network.
      target: whose tokens, dtype and longest text the layers have.

    Raises:
      ValueError: it contradicts itself or the target, or wants what is not implemented.
    """
    if (kind := raw.get("model_type")) not in ("llama", "qwen3"):
        raise ValueError(
            f"{file}: model_type={kind!r} is not supported for the layers of a draft network; only "
            "'llama' and 'qwen3' are"
        )
    types = raw.get("layer_types")
    if types is not None and not (
        isinstance(types, list) and all(isinstance(entry, str) for entry in types)
    ):
        raise ValueError(f"{file}: layer_types={types!r} must be a list of kinds of layers")
    sizes = dict(raw)
    skipped = ("architectures", "auto_map", *TOKEN_IDS, *qwen2.SLIDING_KEYS)
    for key in skipped:
        sizes.pop(key, None)
    sizes |= {name: getattr(target, name) for name in TOKEN_IDS}
    parameters = raw.get("rope_parameters")
    if isinstance(parameters, dict) and set(parameters) & set(keys.TYPES):
        if len({str(parameters.get(kind)) for kind in raw.get("layer_types") or ()}) > 1:
            raise ValueError(
                f"{file}: rope_parameters={parameters!r} must be the same for all layers"
            )
        sizes["rope_parameters"] = parameters.get(keys.TYPES[1], parameters.get(keys.TYPES[0]))
    layers = read_config(file.parent, dtype=target.dtype, raw=sizes)
    if layers.vocab_size != target.vocab_size:
        raise ValueError(
            f"{file}: vocab_size={layers.vocab_size} must be the target's {target.vocab_size}"
        )
    if layers.rope_scaling is not None and layers.rope_scaling.needs_length:
        raise ValueError(
            f"{file}: rotary frequencies of type {layers.rope_scaling.kind!r}, which depend on how "
            "long a text becomes, are not supported in a draft network"
        )
    said = {name: getattr(layers, name) for name in _OF_LAYERS}
    return target.plain(**said, **_read_sliding(file, raw, layers.n_layers))


def _read_sliding(file: pathlib.Path, raw: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Which layers see how far; layer_types alone counts as well as with use_sliding_window."""
    said = dict(raw) | {"num_hidden_layers": num_layers}
    has_types, window = said.get("layer_types") is not None, said.get("sliding_window")
    if said.get("use_sliding_window") is None:
        if window is not None and not has_types:
            raise ValueError(
                f"{file}: sliding_window={window!r} goes with layer_types or use_sliding_window, "
                "which say where it counts"
            )
        said["use_sliding_window"] = has_types and keys.TYPES[1] in said["layer_types"]
    try:
        return qwen2.read_sliding(said)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def write_layers(cfg: ModelConfig) -> dict[str, Any]:
    """Keys that `read_layers` reads as what `cfg` says."""
    is_qwen3 = cfg.qk_norm and not cfg.qkv_bias
    return {
        "attention_bias": cfg.qkv_bias,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "max_position_embeddings": cfg.max_seq_len,
        "model_type": "qwen3" if is_qwen3 else "llama",
        "num_attention_heads": cfg.n_heads,
        "num_hidden_layers": cfg.n_layers,
        "num_key_value_heads": cfg.n_kv_heads,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": False,
        "torch_dtype": cfg.dtype,
        "vocab_size": cfg.vocab_size,
        **token_ids(cfg),
        **write_rope(cfg),
        **qwen2.write_sliding(cfg),
        **({"mlp_bias": True} if cfg.mlp_bias else {}),
    }


def write_config(path: str | pathlib.Path, config: dict[str, Any]) -> None:
    """Writes config.json into a folder that is there."""
    write_json(pathlib.Path(path) / "config.json", dict(sorted(config.items())))


# ---- Tensors -----------------------------------------------------------------------------------


def tensor_names(path: str | pathlib.Path) -> list[str]:
    """Of a directory; FileNotFoundError if there are none."""
    with contextlib.ExitStack() as stack:
        return list(open_tensors(pathlib.Path(path), stack))


def read_published(
    path: str | pathlib.Path,
    names: Mapping[str, str],
    ignored: Collection[str] = (),
    canonical: Callable[[str], str] = str,
) -> dict[str, np.ndarray]:
    """All tensors of a directory, by our names where they have one.

    Args:
      path: the directory.
      names: see above.
      ignored: names of theirs that say nothing.
      canonical: makes names of files those in `names`.

    Raises:
      FileNotFoundError: there are none.
      ValueError: one of `names` is missing, or there is a tensor that is not known.
    """
    with contextlib.ExitStack() as stack:
        files = {canonical(name): x for name, x in open_tensors(pathlib.Path(path), stack).items()}
        if missing := sorted(set(names.values()) - set(files)):
            raise ValueError(f"{path} does not hold such a network: {missing[0]} is missing")
        unknown = sorted(set(files) - {*names.values(), *ignored})
        if unknown := [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]:
            raise ValueError(
                f"{path} does not hold such a network: nothing here reads {unknown[0]}, which "
                "belongs to another kind"
            )
        for name, x in files.items():
            kinds = _INTEGERS if name in ignored else DTYPES
            if x.get_dtype() not in (*DTYPES, *kinds):
                raise ValueError(
                    f"{path}: {name} is {x.get_dtype()}, and must be {' or '.join(kinds)}"
                )
        ours = {theirs: name for name, theirs in names.items()}
        return {ours.get(theirs, theirs): x[:] for theirs, x in files.items()}


def from_published(
    path: str | pathlib.Path,
    stored: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    specs: Params,
    dtype: DTypeLike,
) -> Params:
    """Parameters as `specs`; ValueError if a tensor has not as many numbers."""
    leaves = []
    expected, structure = jax.tree_util.tree_flatten_with_path(specs)
    for at, spec in expected:
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        x = stored[name]
        x = x.T if name.endswith(_OUTPUT_FIRST) else x
        merged = (int(np.prod(spec.shape[:-1])), spec.shape[-1])
        if x.shape not in (spec.shape, merged, (int(np.prod(spec.shape)),)):
            raise ValueError(
                f"{path}: {names[name]} of shape {list(stored[name].shape)} must have the "
                f"numbers of {list(spec.shape)} to go with this target"
            )
        leaves.append(jnp.asarray(x.reshape(spec.shape), dtype))
    return jax.tree.unflatten(structure, leaves)


def one_by_one(specs: Params) -> list[Params]:
    """Specifications of stacked layers, layer by layer."""
    of_one = jax.tree.map(
        lambda spec: dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:]), specs
    )
    return [of_one] * jax.tree.leaves(specs)[0].shape[0]


def stacked(layers: list[Params]) -> Params:
    """One tree of layers, side by side."""
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def unstacked(layers: Params) -> list[Params]:
    """The trees that `stacked` put side by side."""
    num = jax.tree.leaves(layers)[0].shape[0]
    return [jax.tree.map(lambda x: x[i], layers) for i in range(num)]  # noqa: B023


def to_published(own: Params, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a file, by name."""
    tensors = {}
    for at, leaf in jax.tree_util.tree_flatten_with_path(own)[0]:
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        x = np.asarray(leaf)
        x = x.reshape(-1) if name.endswith("_bias") else x
        x = x.reshape(-1, x.shape[-1]) if x.ndim == 3 and "attention/" in name else x
        tensors[names[name]] = np.ascontiguousarray(x.T if name.endswith(_OUTPUT_FIRST) else x)
    return tensors


def write_published(path: str | pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file into a folder, made if needed."""
    root = pathlib.Path(path)
    root.mkdir(parents=True, exist_ok=True)
    write_tensors(root / SINGLE, tensors)
