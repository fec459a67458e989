"""Seed-OSS: Llama with biases of queries, keys and values, and a width of heads of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.formats import llama
from dlm.hf.rope import KEYS, read_rope, write_rope


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        **read_rope(raw),
        "qkv_bias": keys.flag(raw, "attention_bias", True),
        "o_bias": keys.flag(raw, "attention_out_bias", False),
        "mlp_bias": keys.flag(raw, "mlp_bias", False),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        "attention_bias": cfg.qkv_bias,
        "attention_out_bias": cfg.o_bias,
        "mlp_bias": cfg.mlp_bias,
    }


FORMAT = dataclasses.replace(
    llama.FORMAT,
    model_type="seed_oss",
    architecture="SeedOssForCausalLM",
    absent={
        **llama.FORMAT.absent,
        "head_dim": lambda raw: 128,
        "num_key_value_heads": keys.kv_heads(8),
        "rms_norm_eps": lambda raw: 1e-6,
        "max_position_embeddings": lambda raw: 524_288,
    },
    extra={**llama.FORMAT.extra, "residual_dropout": 0.0},
    has_mask=False,
    read=_read,
    write=_write,
    keys=(*KEYS, "attention_bias", "attention_out_bias", "mlp_bias"),
)
