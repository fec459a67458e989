"""SmolLM3: Llama, every fourth of whose layers rotates nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.formats import llama
from dlm.hf.rope import KEYS, read_rope, write_rope


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    layers, every = raw["num_hidden_layers"], keys.positive(raw, "no_rope_layer_interval", 4)
    rotates = keys.per_layer(raw, "no_rope_layers", layers, (0, 1))  # 1: it does
    if rotates is None:
        rotates = [int((i + 1) % every > 0) for i in range(layers)]
    window = keys.whole(raw, "sliding_window")
    if not keys.flag(raw, "use_sliding_window", False):
        window = None
    absent = [window is not None and not rotated for rotated in rotates]
    window, is_sliding = keys.sliding_layers(raw, layers, window, absent)
    pattern = keys.pattern(layers, is_sliding=is_sliding, has_rope=[bool(x) for x in rotates])
    return {
        **read_rope(raw, theta=2_000_000.0),
        **llama.read_biases(raw),
        "sliding_window": window,
        "pattern": pattern,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        **llama.write_biases(cfg),
        "no_rope_layers": [int(kind == "rotary") for kind in cfg.kinds("positions")],
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
        "layer_types": keys.layer_types([kind == "sliding" for kind in cfg.kinds("attention")]),
    }


FORMAT = dataclasses.replace(
    llama.FORMAT,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    absent={
        **llama.FORMAT.absent,
        "num_key_value_heads": keys.kv_heads(4),
        "rms_norm_eps": lambda raw: 1e-6,
        "max_position_embeddings": lambda raw: 32_768,
        "tie_word_embeddings": lambda raw: True,
    },
    read=_read,
    write=_write,
    keys=(
        *(*KEYS, "attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"),
        *("use_sliding_window", "sliding_window", "layer_types"),
    ),
)
