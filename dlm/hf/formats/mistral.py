"""Mistral: Llama without biases, all of whose layers may be sliding."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.formats import qwen2
from dlm.hf.rope import KEYS, read_rope, write_rope


def read_window(raw: dict[str, Any], absent: int | None = None, **kinds: Any) -> dict[str, Any]:
    """The window of all layers, or none; `absent`: what it is where the key is not there."""
    layers, window = raw["num_hidden_layers"], keys.whole(raw, "sliding_window", absent)
    window, is_sliding = keys.sliding_layers(raw, layers, window, [window is not None] * layers)
    if window is not None and not all(is_sliding):
        raise ValueError(f"layer_types={raw['layer_types']!r} must be the same for all layers")
    pattern = keys.pattern(layers, is_sliding=is_sliding, **kinds)
    return {"sliding_window": window, "pattern": pattern}


def write_window(cfg: ModelConfig) -> dict[str, Any]:
    """The key that `read_window` reads."""
    return {"sliding_window": cfg.sliding_window}


FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="mistral",
    architecture="MistralForCausalLM",
    absent={
        **qwen2.FORMAT.absent,
        "num_key_value_heads": keys.kv_heads(8),
        "rms_norm_eps": lambda raw: 1e-6,
    },
    implied={"shifted_logits": True},
    has_mask=None,
    read=lambda raw: {**read_rope(raw), **read_window(raw, 4096)},
    write=lambda cfg: {**write_rope(cfg), **write_window(cfg)},
    keys=(*KEYS, "sliding_window", "layer_types"),
)
