"""Granite 3: Llama whose embeddings, scores, branches and logits are multiplied by constants."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.formats import llama
from dlm.hf.rope import KEYS, read_rope, write_rope

SCALES = {  # field: key
    "embed_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
}
DIVISOR = "logits_scaling"


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        **read_rope(raw),
        **llama.read_biases(raw),
        **{name: _positive(raw, key) for name, key in SCALES.items()},
        "logit_scale": 1 / _positive(raw, DIVISOR),
    }


def _positive(raw: dict[str, Any], key: str) -> float:
    value = keys.number(raw, key, 1.0)
    if value is None or not value > 0:
        raise ValueError(f"{key}={value!r} must be positive")
    return float(value)


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        **llama.write_biases(cfg),
        **{key: getattr(cfg, name) for name, key in SCALES.items()},
        DIVISOR: 1 / cfg.logit_scale,
    }


FORMAT = dataclasses.replace(
    llama.FORMAT,
    model_type="granite",
    architecture="GraniteForCausalLM",
    absent={**llama.FORMAT.absent, "rms_norm_eps": lambda raw: 1e-6},
    read=_read,
    write=_write,
    keys=(*KEYS, "attention_bias", "mlp_bias", *SCALES.values(), DIVISOR),
)
