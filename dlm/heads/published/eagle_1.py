"""EAGLE-1 and -2 in the layout of their public code: config.json and safetensors."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np

from dlm.config import ModelConfig
from dlm.heads.eagle_1 import Eagle1Network, network_specs
from dlm.heads.published.layout import (
    from_published,
    published_layer,
    read_layers,
    read_network,
    read_published,
    tensor_names,
    to_published,
    write_config,
    write_layers,
    write_published,
)
from dlm.hf import keys
from dlm.params import ParamSpec

# What files say of the network besides its layer, and what it is where they do not.
_SWITCHES = {"bias": True, "qkv_bias": False}


def load(path: str | pathlib.Path, cfg: ModelConfig) -> Eagle1Network:
    """A network in the layout of the public code, of EAGLE-1 or -2: config.json and safetensors.

    As in that code the layer is a Llama's whatever `model_type` says, `bias` is that of "fc" and
    true where it is absent, and `qkv_bias` that of queries, keys and values. An embedding that is
    stored is the network's own.

    Args:
      path: the directory.
      cfg: the target.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the target, or wants what is not implemented; the message names
        file, key and value.
    """
    file, raw = read_network(path)
    try:
        has = {key: keys.flag(raw, key, absent) for key, absent in _SWITCHES.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    of_layers = {key: value for key, value in raw.items() if key not in _SWITCHES}
    if raw.get("model_type") == "qwen2":
        of_layers["model_type"] = "llama"
    layer = read_layers(file, of_layers, cfg)
    for name, key in {"n_layers": "num_hidden_layers", "d_model": "hidden_size"}.items():
        needed = 1 if name == "n_layers" else cfg.d_model
        if (got := getattr(layer, name)) != needed:
            raise ValueError(
                f"{file}: {key}={got} must be {needed} to go with this target: the network has one "
                "layer, of the target's width"
            )
    layer = dataclasses.replace(layer, qkv_bias=has["qkv_bias"] or layer.qkv_bias)
    held = tensor_names(path)
    if ("fc.bias" in held) != has["bias"]:
        raise ValueError(
            f"{file}: bias={has['bias']} must be {not has['bias']}, or absent for True, as "
            f"{path} has {'a' if 'fc.bias' in held else 'no'} tensor fc.bias"
        )
    specs, names = network_specs(layer), _names(layer)
    zeros = np.zeros(layer.d_model, cfg.jnp_dtype)
    if "embed_tokens.weight" in held:
        specs["embed"] = ParamSpec((cfg.vocab_size, layer.d_model), ("vocab", "embed"))
        names["embed"] = "embed_tokens.weight"
    missing = set() if has["bias"] else {"fc_bias"}
    stored = read_published(path, {k: v for k, v in names.items() if k not in missing})
    stored |= dict.fromkeys(missing, zeros)
    own = from_published(path, stored, names, specs, cfg.jnp_dtype)
    return Eagle1Network(own, None, dataclasses.replace(layer, tie_embeddings=False))


def save(path: str | pathlib.Path, network: Eagle1Network) -> None:
    """Writes what `load` reads, into a folder, made if needed."""
    names = _names(network.cfg) | {"embed": "embed_tokens.weight"}
    write_published(path, to_published(network.own, names))
    config = write_layers(network.cfg) | {"attention_bias": False, "bias": True}
    write_config(path, config | {"qkv_bias": network.cfg.qkv_bias})


def _names(layer: ModelConfig) -> dict[str, str]:
    return published_layer("layers.0", layer) | {"fc": "fc.weight", "fc_bias": "fc.bias"}
