"""DFlash and DFlash 2 in the layout of the public code: config.json and safetensors."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from dlm.config import ModelConfig
from dlm.heads.dflash import DFlashNetwork, network_specs
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
    to_published,
    unstacked,
    write_config,
    write_layers,
    write_published,
)
from dlm.hf import keys
from dlm.hf.files import MOST_LAYERS
from dlm.params import Params

# What files say of the network, in dflash_config or else beside it, and what it is if they do not.
_SAID: dict[str, Any] = {
    "mask_token_id": None,
    "target_layer_ids": None,
    "block_size": 16,
    "conv_kernel_size": None,
    "conv_group_size": None,
    "selector_rank": None,
    "selector_top_k": None,
    "output_multiplier": 1.0,
    "final_logit_softcapping": None,
    "input_embedding_scale": 1.0,
}
_ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
_WINDOWS = ("causal", "use_swa", "swa_window_size")  # only in dflash_config


def load(path: str | pathlib.Path, cfg: ModelConfig) -> DFlashNetwork:
    """A network of DFlash or DFlash 2 in the layout of the public code: config.json, safetensors.

    Where the file does not say whether attention is causal in the block, it is if layers have
    sliding windows, as in the public code.

    Args:
      path: the directory.
      cfg: the target.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: it does not fit the target, or wants what is not implemented; the message names
        file, key and value.
    """
    file, raw = read_network(path)
    if "speculators_model_type" in raw:
        raise ValueError(
            f"{file}: speculators_model_type={raw['speculators_model_type']!r} is not supported; "
            "only the layout of the networks' authors is"
        )
    read_architectures(file, raw, _ARCHITECTURES)
    about = read_section(file, raw, "dflash_config", (*_SAID, *_WINDOWS))
    said = {key: about.get(key, raw.get(key)) for key in _SAID}
    said = {key: _SAID[key] if value is None else value for key, value in said.items()}
    if missing := [key for key in ("mask_token_id", "target_layer_ids") if said[key] is None]:
        raise ValueError(f"{file} must give {missing[0]}, in dflash_config or beside it")
    num_layers = raw.get("num_target_layers")
    if num_layers not in (None, cfg.n_layers):
        raise ValueError(
            f"{file}: num_target_layers={num_layers!r} must be the target's n_layers={cfg.n_layers}"
        )
    network = _read_network(file, raw, about, said, cfg)
    names = _names(network.cfg, network.own)
    stored = read_published(path, names)
    flat = network.own | {"layers": one_by_one(network.own["layers"])}
    own = from_published(path, stored, names, flat, cfg.jnp_dtype)
    return network.replace(own=own | {"layers": stacked(own["layers"])})


def _read_network(
    file: pathlib.Path,
    raw: Mapping[str, Any],
    about: Mapping[str, Any],
    said: Mapping[str, Any],
    cfg: ModelConfig,
) -> DFlashNetwork:
    """With specifications of its parameters in their place."""
    beside = ("architectures", "auto_map", "dflash_config", "num_target_layers", "is_causal")
    of_layers = {key: value for key, value in raw.items() if key not in (*beside, *_SAID)}
    if about.get("use_swa"):
        num_layers = raw.get("num_hidden_layers")
        if "sliding_attention" in str(raw.get("layer_types")):
            raise ValueError(f"{file}: use_swa=True and layer_types both say which layers slide")
        if type(num_layers) is not int or not 1 <= num_layers <= MOST_LAYERS:
            raise ValueError(
                f"{file}: num_hidden_layers={num_layers!r:.60} must be an integer in [1, "
                f"{MOST_LAYERS}]"
            )
        of_layers |= {
            "layer_types": ["sliding_attention"] * num_layers,
            "sliding_window": about.get("swa_window_size"),
            "use_sliding_window": True,
        }
    layers = read_layers(file, of_layers, cfg)
    if layers.d_model != cfg.d_model:
        raise ValueError(
            f"{file}: hidden_size={layers.d_model} must be the target's d_model={cfg.d_model}"
        )
    block_len, W = said["block_size"], layers.sliding_window
    if type(block_len) is not int or block_len < 2:
        raise ValueError(f"{file}: block_size={block_len!r} must be an integer of at least 2")
    if W is not None and block_len > W:
        raise ValueError(f"{file}: sliding_window={W} must be at least block_size={block_len}")
    mask_id = said["mask_token_id"]
    if type(mask_id) is not int or not 0 <= mask_id < cfg.vocab_size:
        raise ValueError(
            f"{file}: mask_token_id={mask_id!r} must be a token in [0, vocab_size={cfg.vocab_size})"
        )
    ids = said["target_layer_ids"]
    is_list = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
    if not is_list or not all(0 <= i < cfg.n_layers for i in ids):
        raise ValueError(
            f"{file}: target_layer_ids={ids!r} must be layers of the target, in [0, n_layers="
            f"{cfg.n_layers})"
        )
    pairs = (("conv_kernel_size", "conv_group_size"), ("selector_rank", "selector_top_k"))
    for pair in pairs:
        given = [said[key] for key in pair]
        if given != [None, None] and any(type(x) is not int or x < 1 for x in given):
            raise ValueError(
                f"{file}: {pair[0]}={given[0]!r} and {pair[1]}={given[1]!r} must be integers of at "
                "least 1, both or none"
            )
    group = said["conv_group_size"] or 1
    if layers.d_model % group:
        raise ValueError(f"{file}: conv_group_size={group} must divide {layers.d_model}")
    if (top := said["selector_top_k"]) is not None and top > cfg.vocab_size:
        raise ValueError(f"{file}: selector_top_k={top} must be at most {cfg.vocab_size}")
    try:
        scales = {
            "embed_scale": keys.number(dict(said), "input_embedding_scale"),
            "logit_scale": keys.number(dict(said), "output_multiplier"),
            "logit_cap": keys.number(dict(said), "final_logit_softcapping") or None,
        }
        layers = dataclasses.replace(layers, tie_embeddings=True, **scales)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    specs = network_specs(
        layers,
        len(ids),
        taps=said["conv_kernel_size"] or 0,
        groups=layers.d_model // group,
        rank=said["selector_rank"] or 0,
    )
    return DFlashNetwork(
        specs,
        layers,
        tuple(i + 1 for i in ids),
        block_len,
        mask_id,
        is_causal=_is_causal(file, raw, about, layers),
        num_candidates=said["selector_top_k"] or 0,
    )


def _is_causal(
    file: pathlib.Path, raw: Mapping[str, Any], about: Mapping[str, Any], layers: ModelConfig
) -> bool:
    """Whether attention in the block is causal."""
    said = {"is_causal": raw.get("is_causal"), "causal": about.get("causal")}
    given = {key: value for key, value in said.items() if value is not None}
    for key, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{file}: {key}={value!r} must be true or false")
    if len(set(given.values())) > 1:
        raise ValueError(
            f"{file}: is_causal={said['is_causal']} and causal={said['causal']} differ"
        )
    if given:
        return next(iter(given.values()))
    if about.get("use_swa"):
        raise ValueError(f"{file}: use_swa=True must come with causal, which it does not imply")
    kinds = set(layers.kinds("attention"))
    if len(kinds) > 1:
        raise ValueError(
            f"{file}: layer_types has sliding and full layers, of which the former would be causal "
            "in the block and the latter not, which is not supported: give is_causal"
        )
    return kinds == {"sliding"}


def save(path: str | pathlib.Path, network: DFlashNetwork) -> None:
    """Writes what `load` reads, into a folder, made if needed."""
    cfg, own = network.cfg, network.own
    flat = own | {"layers": unstacked(own["layers"])}
    write_published(path, to_published(flat, _names(cfg, own)))
    about: dict[str, Any] = {
        "mask_token_id": network.mask_id,
        "target_layer_ids": [layer - 1 for layer in network.feature_layers],
        "block_size": network.block_len,
        "output_multiplier": cfg.logit_scale,
        "final_logit_softcapping": cfg.logit_cap,
        "input_embedding_scale": cfg.embed_scale,
    }
    kind = "DFlashDraftModel"
    if (conv := own["layers"].get("attention_conv")) is not None:
        _, _, taps, D = conv["base"].shape
        groups = conv["projection"].shape[-1] // (2 * taps)
        about |= {"conv_kernel_size": taps, "conv_group_size": D // groups}
        kind = "DFlash2DraftModel"
    if "selector" in own:
        rank = own["selector"]["hidden"].shape[-1]
        about |= {"selector_rank": rank, "selector_top_k": network.num_candidates}
        kind = "DFlash2DraftModel"
    write_config(
        path,
        write_layers(cfg)
        | {"architectures": [kind], "dflash_config": about, "is_causal": network.is_causal},
    )


def _names(layers: ModelConfig, own: Params) -> dict[str, str]:
    names = {"fc": "fc.weight", "context_norm": "hidden_norm.weight", "final_norm": "norm.weight"}
    for i in range(layers.n_layers):
        prefix = f"layers.{i}"
        of_layer = published_layer(prefix, layers)
        of_layer["attention_norm"] = f"{prefix}.input_layernorm.weight"
        for name in ("attention_conv", "mlp_conv"):
            if name in own["layers"]:
                of_layer[f"{name}/base"] = f"{prefix}.{name}.base_kernel"
                of_layer[f"{name}/projection"] = f"{prefix}.{name}.kernel_projection.weight"
        names |= {f"layers/{i}/{ours}": theirs for ours, theirs in of_layer.items()}
    if "selector" in own:
        names |= {
            "selector/predecessor": "candidate_selector.predecessor_codebook",
            "selector/successor": "candidate_selector.successor_codebook",
            "selector/hidden": "candidate_selector.hidden_projection.weight",
        }
    return names
