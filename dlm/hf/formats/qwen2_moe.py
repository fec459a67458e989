"""Qwen2 with experts, and one that every token goes through, weighed by a gate of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import qwen2, qwen3_moe
from dlm.hf.rope import KEYS, read_rope, write_rope

SHARED = qwen3_moe.MLP + "shared_expert."
WIDTH = "shared_expert_intermediate_size"


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    shared = keys.positive(raw, WIDTH, 5632)
    given = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408} | raw
    experts, has_experts = qwen3_moe.read_experts(given, shared_d_ff=shared, has_shared_gate=True)
    layers, first = raw["num_hidden_layers"], keys.whole(raw, "max_window_layers", 28)
    window = keys.whole(raw, "sliding_window", 4096)
    if not keys.flag(raw, "use_sliding_window", False):
        window = None
    absent = [window is not None and i < first and i % 2 == 0 for i in range(layers)]
    window, is_sliding = keys.sliding_layers(raw, layers, window, absent)
    return {
        **read_rope(raw),
        "sliding_window": window,
        "pattern": keys.pattern(layers, has_experts=has_experts, is_sliding=is_sliding),
        "experts": experts,
        "qkv_bias": keys.flag(raw, "qkv_bias", True),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    shared = keys.experts_of(cfg).shared_d_ff
    return {
        **write_rope(cfg),
        **qwen3_moe.write_experts(cfg),
        **qwen2.write_sliding(cfg),
        WIDTH: shared,
        "qkv_bias": cfg.qkv_bias,
    }


FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    absent={
        **qwen2.FORMAT.absent,
        "num_key_value_heads": keys.kv_heads(16),
        "rms_norm_eps": lambda raw: 1e-6,
    },
    implied={"shifted_logits": True},
    extra={**qwen2.FORMAT.extra, "router_aux_loss_coef": 0.001},
    tensors={
        **qwen2.FORMAT.tensors,
        **qwen3_moe.MOE,
        "layers/moe/shared/gate": Stored(SHARED + "gate_proj.weight", "s d -> ds"),
        "layers/moe/shared/up": Stored(SHARED + "up_proj.weight", "s d -> ds"),
        "layers/moe/shared/down": Stored(SHARED + "down_proj.weight", "d s -> sd"),
        "layers/moe/shared_gate": Stored(qwen3_moe.MLP + "shared_expert_gate.weight", "a d -> da"),
    },
    has_mask=None,
    read=_read,
    write=_write,
    keys=(*KEYS, *qwen3_moe.MOE_KEYS, *qwen2.SLIDING_KEYS, WIDTH, "qkv_bias"),
)
