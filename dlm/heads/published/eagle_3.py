"""EAGLE-3 and -3.1 in the layouts of four public codes: config.json and safetensors."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from dlm.config import ModelConfig
from dlm.heads.eagle_3 import Eagle3Heads, Eagle3Network, network_specs
from dlm.heads.published.layout import (
    from_published,
    one_by_one,
    published_layer,
    read_architectures,
    read_layers,
    read_network,
    read_published,
    read_section,
    stacked,
    tensor_names,
    to_published,
    unstacked,
    write_config,
    write_layers,
    write_published,
)
from dlm.hf.harmless import check_keys
from dlm.params import Params, ParamSpec

# Switches, and what they are where a file does not say.
_SWITCHES = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
# What else files may say of such networks, and the only value that is implemented.
_FIXED = {
    "use_aux_hidden_state": True,
    "use_last_layernorm": True,
    "use_input_layernorm_in_first_layer": True,
    "use_mtp_layernorm": False,
}
_IDS = "eagle_aux_hidden_state_layer_ids"
_NETWORK = ("draft_vocab_size", "target_hidden_size", "eagle_config", _IDS, *_SWITCHES, *_FIXED)
_SPECULATORS = ("speculators_model_type", "speculators_config", "speculators_version")
# Whose layers are a Llama's where model_type is the target's, as it often is.
_LLAMAS = (
    *("LlamaForCausalLM", "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"),
    "LlamaEagle3DraftModel",
)
_ARCHITECTURES = (*_LLAMAS, "Eagle3Speculator", "Eagle3DraftModel")


def load(
    path: str | pathlib.Path,
    cfg: ModelConfig,
    *,
    layers: tuple[int, ...] | None = None,
    norm_before_residual: bool | None = None,
    norm_output: bool | None = None,
) -> Eagle3Network:
    """A network in the layouts of the public codes: config.json and safetensors.

    config.json is that of EAGLE's own code, of SpecForge, of speculators or of Model-Optimizer. The
    vocabulary is stored as "d2t", what is to be added to a draft token to get the target's. Which
    layers of the target are read has two readings: a list that begins with 1 is one of layers whose
    output is read, any other one of layers whose input is (as here); without a list it is the
    published ones.

    Args:
      path: the directory.
      cfg: the target.
      layers: at whose entrance the target is read, in the order of the features; None: as the file
        says.
      norm_before_residual: instead of what the file says.
      norm_output: likewise. (Files of SpecForge from before September 2026 say true where nothing
        of the kind is done.)

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the target, or wants what is not implemented; the message names
        file, key and value.
    """
    file, raw = read_network(path)
    said, of_layers = _split(file, raw)
    switches = {name: _flag(file, said, name) for name in _SWITCHES}
    given = {"norm_before_residual": norm_before_residual, "norm_output": norm_output}
    switches |= {name: value for name, value in given.items() if value is not None}
    unsaid = said.get("norm_before_residual") is None and norm_before_residual is None
    if unsaid and "speculators_model_type" in raw:
        raise ValueError(
            f"{file} must give norm_before_residual, which readers of such files take for "
            "different things where it is absent: give it as an argument"
        )
    if switches["fc_norm"] and switches["norm_before_fc"]:
        raise ValueError(f"{file}: fc_norm=True and norm_before_fc=True exclude each other")
    network = read_layers(file, of_layers, cfg)
    width = said.get("target_hidden_size") or network.d_model
    if width != cfg.d_model:
        raise ValueError(
            f"{file}: target_hidden_size={width!r} (by default hidden_size) must be the target's "
            f"d_model={cfg.d_model}"
        )
    chosen = _layers_read(file, said, cfg) if layers is None else tuple(layers)
    if not chosen or not all(0 <= layer <= cfg.n_layers for layer in chosen):
        raise ValueError(
            f"{path}: layers={chosen} must be in [0, n_layers={cfg.n_layers}] of the target"
        )
    num_ids = said.get("draft_vocab_size") or cfg.vocab_size
    if type(num_ids) is not int or not 1 <= num_ids <= cfg.vocab_size:
        raise ValueError(
            f"{file}: draft_vocab_size={num_ids!r} must be an integer in [1, vocab_size="
            f"{cfg.vocab_size}]"
        )
    specs = network_specs(
        network,
        (cfg.d_model,) * len(chosen),
        num_ids,
        fc_norm=switches["fc_norm"],
        norm_before_fc=switches["norm_before_fc"],
    )
    own, ids = _read_tensors(pathlib.Path(path), network, specs, num_ids, cfg)
    return Eagle3Network(
        own,
        None if ids is None else jnp.asarray(ids, jnp.int32),
        dataclasses.replace(network, tie_embeddings=False),
        chosen,
        norm_before_residual=switches["norm_before_residual"],
        norm_output=switches["norm_output"],
    )


def _split(file: pathlib.Path, raw: dict[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a config.json says of the network, and what it says of its layers."""
    nested = read_section(file, raw, "eagle_config", _NETWORK)
    kinds = read_architectures(file, raw, _ARCHITECTURES)
    said = nested | {key: value for key, value in raw.items() if value is not None}
    for key, only in _FIXED.items():
        if said.get(key) not in (None, only):
            raise ValueError(f"{file}: {key}={said[key]!r} is not supported; only {only} is")
    rest = {key: value for key, value in raw.items() if key not in _NETWORK}
    if "speculators_model_type" not in raw:
        kind = raw.get("model_type")
        is_llama = isinstance(kind, str) and kind != "qwen3" and {*kinds} & {*_LLAMAS}
        return said, rest | ({"model_type": "llama"} if is_llama else {})
    if (kind := raw["speculators_model_type"]) != "eagle3":
        raise ValueError(
            f"{file}: speculators_model_type={kind!r} is not supported; only 'eagle3' is"
        )
    of_layers = rest.pop("transformer_layer_config", None)
    if not isinstance(of_layers, dict):
        raise ValueError(f"{file}: transformer_layer_config={of_layers!r} must be an object")
    ours = (*_SPECULATORS, "embed_requires_grad", "architectures", "model_type")
    check_keys(file, rest, (*ours, "tie_word_embeddings"))
    tied = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
    return said, of_layers | tied


def _flag(file: pathlib.Path, said: Mapping[str, Any], key: str) -> bool:
    value = said.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{file}: {key}={value!r} must be true or false")
    return value


def _layers_read(file: pathlib.Path, said: Mapping[str, Any], cfg: ModelConfig) -> tuple[int, ...]:
    """At whose entrance the target is read."""
    ids = said.get(_IDS)
    if ids is None:
        return Eagle3Heads().feature_layers(cfg)
    if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
        raise ValueError(f"{file}: {_IDS}={ids!r} must be a list of integers")
    shift = 1 if ids[0] == 1 else 0
    if not all(0 <= i + shift <= cfg.n_layers for i in ids):
        raise ValueError(
            f"{file}: {_IDS}={ids!r} must be layers of the target, which has {cfg.n_layers}"
        )
    return tuple(i + shift for i in ids)


def _names(network: ModelConfig, specs: Params) -> dict[str, str]:
    first = "layers.0"
    names = published_layer(first, network) | {
        "fc": "fc.weight",
        "embed_norm": f"{first}.input_layernorm.weight",
        "state_norm": f"{first}.hidden_norm.weight",
        "final_norm": "norm.weight",
    }
    for i in range(1, network.n_layers):
        prefix = f"layers.{i}"
        more = published_layer(prefix, network)
        more["attention_norm"] = f"{prefix}.input_layernorm.weight"
        names |= {f"more/{i - 1}/{ours}": theirs for ours, theirs in more.items()}
    if "fc_norm" in specs:
        names |= {f"fc_norm/{i}": f"fc_norm.{i}.weight" for i in range(specs["fc_norm"].shape[0])}
    if "input_norm" in specs:
        names["input_norm"] = "input_norm.weight"
    if "unembed" in specs:
        names["unembed"] = "lm_head.weight"
    if "embed" in specs:
        names["embed"] = "embed_tokens.weight"
    return names


def _canonical(name: str) -> str:
    """One name of those under which the public codes store the same tensor."""
    name = name.removeprefix("model.")
    return re.sub(r"^midlayer\.(?:(\d+)\.)?", lambda found: f"layers.{found[1] or 0}.", name)


def _read_tensors(
    path: pathlib.Path, network: ModelConfig, specs: Params, num_ids: int, cfg: ModelConfig
) -> tuple[Params, np.ndarray | None]:
    """Parameters as `specs`, and tokens [U] that can be drafted; None: all."""
    V, D = cfg.vocab_size, network.d_model
    held = {_canonical(name) for name in tensor_names(path)}
    specs = dict(specs)
    if any(name.endswith("q_norm.weight") for name in held) != network.qk_norm:
        raise ValueError(
            f"{path / 'config.json'}: model_type does not go with the tensors: norms of queries "
            "and keys are what 'qwen3' has and 'llama' has not"
        )
    is_tied = network.tie_embeddings and "lm_head.weight" not in held
    if network.tie_embeddings != is_tied:  # what is true of the target is often copied
        logging.warning(
            "%s: tie_word_embeddings=True is not what the tensors say: lm_head.weight is taken.",
            path / "config.json",
        )
    if "embed_tokens.weight" in held:
        specs["embed"] = ParamSpec((V, D), ("vocab", "embed"))
    elif cfg.d_model != D or is_tied:
        raise ValueError(
            f"{path} must hold embed_tokens.weight: the network has an embedding of its own"
        )
    if "lm_head.weight" not in held:
        del specs["unembed"]
        if num_ids != V or (cfg.d_model != D and not is_tied):
            raise ValueError(f"{path} must hold lm_head.weight, a head for {num_ids} tokens")
    names = _names(network, specs)
    flat = dict(specs)
    if "more" in specs:
        flat["more"] = one_by_one(specs["more"])
    if "fc_norm" in specs:
        flat["fc_norm"] = one_by_one({"x": specs["fc_norm"]})
        flat["fc_norm"] = [part["x"] for part in flat["fc_norm"]]
    ignored = ("d2t", "t2d")
    stored = read_published(path, names, ignored, _canonical)
    own = from_published(path, stored, names, flat, cfg.jnp_dtype)
    if "more" in own:
        own["more"] = stacked(own["more"])
    if "fc_norm" in own:
        own["fc_norm"] = jnp.stack(own["fc_norm"])
    if is_tied:
        own["unembed"] = own["embed"]
    return own, _draft_ids(path, stored, num_ids, V)


def _draft_ids(
    path: pathlib.Path, stored: Mapping[str, np.ndarray], num_ids: int, num_tokens: int
) -> np.ndarray | None:
    if "d2t" not in stored:
        if num_ids == num_tokens:
            return None
        raise ValueError(
            f"{path} must hold d2t, which says for which tokens its {num_ids} of {num_tokens} "
            "outputs stand"
        )
    offsets = stored["d2t"].astype(np.int64)
    if offsets.shape != (num_ids,):
        raise ValueError(
            f"{path}: d2t of shape {list(offsets.shape)} must have the {num_ids} entries of "
            "draft_vocab_size"
        )
    ids = np.arange(num_ids) + offsets
    if np.any(np.diff(ids) <= 0) or not 0 <= ids[0] <= ids[-1] < num_tokens:
        raise ValueError(
            f"{path}: the tokens that d2t stands for must ascend, in [0, vocab_size={num_tokens})"
        )
    if "t2d" in stored and set(np.flatnonzero(stored["t2d"]).tolist()) != set(ids.tolist()):
        raise ValueError(
            f"{path}: t2d must be true of the tokens that d2t stands for, and of none else"
        )
    return None if num_ids == num_tokens else ids


def save(path: str | pathlib.Path, network: Eagle3Network) -> None:
    """Writes what `load` reads, into a folder, made if needed.

    Raises:
      ValueError: the first feature is of layer 1, which readers would take for another one.
    """
    if network.feature_layers[0] == 1:
        raise ValueError(
            f"layers={network.feature_layers} cannot be said in a file: a list that begins with 1 "
            "is read as one of outputs"
        )
    num_tokens = network.cfg.vocab_size
    ids = np.arange(num_tokens) if network.ids is None else np.asarray(network.ids)
    vocab = {
        "d2t": ids.astype(np.int64) - np.arange(len(ids)),
        "t2d": np.isin(np.arange(num_tokens), ids),
    }
    own = dict(network.own)
    if "more" in own:
        own["more"] = unstacked(own["more"])
    if "fc_norm" in own:
        own["fc_norm"] = list(own["fc_norm"])
    write_published(path, to_published(own, _names(network.cfg, network.own)) | vocab)
    config = write_layers(network.cfg) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(ids),
        "target_hidden_size": network.target_width,
        _IDS: list(network.feature_layers),
        "fc_norm": "fc_norm" in own,
        "norm_before_fc": "input_norm" in own,
        "norm_before_residual": network.norm_before_residual,
        "norm_output": network.norm_output,
    }
    write_config(path, config)
