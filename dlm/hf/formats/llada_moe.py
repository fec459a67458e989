"""LLaDA-MoE: bidirectional, with experts, under LLaDA's `model_type`.

Layers are dense where `moe_layer_freq` has a 0. A bias of the router, where there is one, is added
to the softmax before experts are chosen and to the weights that they get.
"""

from __future__ import annotations

from typing import Any

from dlm.config import Experts, ModelConfig
from dlm.hf import keys
from dlm.hf.format import Format, Stored
from dlm.hf.formats import llama, qwen3, qwen3_moe
from dlm.hf.rope import KEYS, read_rope, write_rope

LAYER = "model.layers.{}."


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    is_moe = keys.per_layer(raw, "moe_layer_freq", layers, (0, 1)) or [1] * layers
    shared = keys.whole(raw, "shared_expert_intermediate_size") or 0
    experts = Experts(
        num_experts=keys.required(raw, "num_experts"),
        num_chosen=keys.required(raw, "num_experts_per_tok"),
        d_ff=keys.required(raw, "expert_intermediate_size"),
        is_renormalised=keys.flag(raw, "norm_topk_prob", False),
        bias="weigh" if keys.flag(raw, "moe_router_enable_expert_bias", False) else "none",
        shared_d_ff=shared,
    )
    if experts.is_renormalised:
        raise ValueError("norm_topk_prob=True is not supported; only False or null is")
    has_bias = keys.flag(raw, "attention_bias", False)
    return {
        **read_rope(raw, theta=500_000.0, is_partial=True),
        "experts": experts,
        "pattern": keys.pattern(layers, has_experts=[bool(x) for x in is_moe]),
        "qk_norm": keys.flag(raw, "qk_layernorm", True),
        "clip_qkv": keys.number(raw, "clip_qkv"),
        "qkv_bias": has_bias,
        "o_bias": has_bias,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    experts = keys.experts_of(cfg)
    return {
        **write_rope(cfg),
        "rope_scaling": None,
        "moe_layer_freq": [int(kind == "experts") for kind in cfg.kinds("mlp")],
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_chosen,
        "expert_intermediate_size": experts.d_ff,
        "shared_expert_intermediate_size": experts.shared_d_ff or None,
        "moe_router_enable_expert_bias": experts.bias == "weigh",
        "norm_topk_prob": experts.is_renormalised,
        "qk_layernorm": cfg.qk_norm,
        "clip_qkv": cfg.clip_qkv,
        "attention_bias": cfg.qkv_bias,
    }


FORMAT = Format(
    model_type="llada",
    architecture="LLaDAMoEModelLM",
    fields={**qwen3.FORMAT.fields, "d_ff": "dense_intermediate_size"},
    absent={
        **qwen3.FORMAT.absent,
        "dense_intermediate_size": lambda raw: keys.required(raw, "expert_intermediate_size"),
        "head_dim": keys.head_dim(),
    },
    fixed={
        "hidden_act": (("silu",), "silu"),
        "moe_router_score_function": (("softmax",), "softmax"),
        "rope_scaling": ((None,), None),
        "routed_scaling_factor": ((1, None), 1),
        "router_num_group": ((None,), None),
        "router_topk_group": ((None,), None),
    },
    implied={"shifted_logits": False},
    extra={"attention_dropout": 0.0, "initializer_range": 0.02},
    tensors={
        **qwen3.FORMAT.tensors,
        **qwen3_moe.MOE,
        "layers/attention/o_bias": llama.BIASES["layers/attention/o_bias"],
        "layers/moe/bias": Stored(LAYER + "mlp.expert_bias", "e -> e"),
        "layers/moe/shared/gate": Stored(LAYER + "shared_expert.gate_proj.weight", "s d -> ds"),
        "layers/moe/shared/up": Stored(LAYER + "shared_expert.up_proj.weight", "s d -> ds"),
        "layers/moe/shared/down": Stored(LAYER + "shared_expert.down_proj.weight", "d s -> sd"),
    },
    default_ids={"mask_token_id": 156895},  # "<|mask|>"; only the tokenizer names it
    has_mask=True,
    read=_read,
    write=_write,
    keys=(
        *(*KEYS, "moe_layer_freq", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
        *("expert_intermediate_size", "shared_expert_intermediate_size", "qk_layernorm"),
        *("moe_router_enable_expert_bias", "clip_qkv", "attention_bias"),
    ),
)
