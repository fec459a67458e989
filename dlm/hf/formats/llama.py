"""Llama 3: biases only where config.json says so."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import qwen2
from dlm.hf.rope import KEYS, read_rope, write_rope


def read_biases(raw: dict[str, Any]) -> dict[str, Any]:
    """Of attention, all four of them or none, and of the MLP."""
    has_bias = keys.flag(raw, "attention_bias", False)
    return {
        "qkv_bias": has_bias,
        "o_bias": has_bias,
        "mlp_bias": keys.flag(raw, "mlp_bias", False),
    }


def write_biases(cfg: ModelConfig) -> dict[str, Any]:
    """Keys that `read_biases` reads."""
    return {"attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias}


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    keys.only(raw, **UNREAD)
    return {**read_rope(raw), **read_biases(raw)}


UNREAD = {"activation": "swiglu"}

BIASES = {
    "layers/attention/o_bias": Stored("model.layers.{}.self_attn.o_proj.bias", "d -> d"),
    "layers/mlp/gate_bias": Stored("model.layers.{}.mlp.gate_proj.bias", "f -> f"),
    "layers/mlp/up_bias": Stored("model.layers.{}.mlp.up_proj.bias", "f -> f"),
    "layers/mlp/down_bias": Stored("model.layers.{}.mlp.down_proj.bias", "d -> d"),
}

FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="llama",
    architecture="LlamaForCausalLM",
    absent={**qwen2.FORMAT.absent, "max_position_embeddings": lambda raw: 2048},
    implied={"shifted_logits": True},
    tensors={**qwen2.FORMAT.tensors, **BIASES},
    has_mask=None,
    read=_read,
    write=lambda cfg: {**write_rope(cfg), **write_biases(cfg)},
    keys=(*KEYS, *UNREAD, "attention_bias", "mlp_bias"),
)
