"""OLMoE: experts in every layer, queries and keys normalised over all heads at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import Experts, ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import llama, qwen2, qwen3_moe
from dlm.hf.rope import KEYS, read_rope, write_rope

JOINT_NORMS = {
    "layers/attention/q_norm": Stored("model.layers.{}.self_attn.q_norm.weight", "nh -> nh"),
    "layers/attention/k_norm": Stored("model.layers.{}.self_attn.k_norm.weight", "kh -> kh"),
}


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    has_bias = keys.flag(raw, "attention_bias", False)
    experts = Experts(
        num_experts=keys.one_of(raw, ("num_experts", "num_local_experts"), 64),
        num_chosen=keys.positive(raw, "num_experts_per_tok", 8),
        d_ff=raw["intermediate_size"],
        is_renormalised=keys.flag(raw, "norm_topk_prob", False),
    )
    return {
        **read_rope(raw),
        "experts": experts,
        "pattern": keys.pattern(raw["num_hidden_layers"], has_experts=True),
        "clip_qkv": keys.number(raw, "clip_qkv"),
        "qkv_bias": has_bias,
        "o_bias": has_bias,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    experts = keys.experts_of(cfg)
    return {
        **write_rope(cfg),
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_chosen,
        "norm_topk_prob": experts.is_renormalised,
        "clip_qkv": cfg.clip_qkv,
        "attention_bias": cfg.qkv_bias,
    }


FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    absent={**qwen2.FORMAT.absent, "rms_norm_eps": lambda raw: 1e-5},
    implied={"qk_norm": True, "joint_qk_norm": True, "shifted_logits": True},
    extra={**qwen2.FORMAT.extra, "router_aux_loss_coef": 0.01},
    tensors={
        **qwen2.FORMAT.tensors,
        **qwen3_moe.MOE,
        **JOINT_NORMS,
        "layers/attention/o_bias": llama.BIASES["layers/attention/o_bias"],
    },
    has_mask=None,
    read=_read,
    write=_write,
    keys=(
        *(*KEYS, "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
        *("clip_qkv", "attention_bias"),
    ),
)
