"""Qwen3 with experts, in all layers or some."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import Experts, ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import llama, mistral, qwen3
from dlm.hf.rope import KEYS, read_rope, write_rope

MLP = "model.layers.{}.mlp."
MOE = {
    "layers/moe/router": Stored(MLP + "gate.weight", "e d -> ed"),
    "layers/moe/gate": Stored(MLP + "experts.{expert}.gate_proj.weight", "g d -> edg"),
    "layers/moe/up": Stored(MLP + "experts.{expert}.up_proj.weight", "g d -> edg"),
    "layers/moe/down": Stored(MLP + "experts.{expert}.down_proj.weight", "d g -> egd"),
}
MOE_KEYS = (
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"),
)

UNREAD = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}


def read_experts(raw: dict[str, Any], **shared: Any) -> tuple[Experts | None, list[bool]]:
    """The experts, None if no layer has them, and which layers do."""
    layers, dense = raw["num_hidden_layers"], raw.get("mlp_only_layers") or []
    step = keys.positive(raw, "decoder_sparse_step", 1)
    if not isinstance(dense, list) or any(entry not in range(layers) for entry in dense):
        raise ValueError(f"mlp_only_layers={dense!r} must be a list of layers of the {layers}")
    has_experts = [i not in dense and (i + 1) % step == 0 for i in range(layers)]
    if not any(has_experts):
        return None, has_experts
    experts = Experts(
        num_experts=keys.one_of(raw, ("num_experts", "num_local_experts"), 128),
        num_chosen=keys.positive(raw, "num_experts_per_tok", 8),
        d_ff=keys.positive(raw, "moe_intermediate_size", 768),
        is_renormalised=keys.flag(raw, "norm_topk_prob", False),
        **shared,
    )
    return experts, has_experts


def write_experts(cfg: ModelConfig) -> dict[str, Any]:
    """Keys that `read_experts` reads."""
    dense = [i for i, kind in enumerate(cfg.kinds("mlp")) if kind == "dense"]
    said: dict[str, Any] = {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if cfg.experts is not None:
        said |= {
            "num_experts": cfg.experts.num_experts,
            "num_experts_per_tok": cfg.experts.num_chosen,
            "moe_intermediate_size": cfg.experts.d_ff,
            "norm_topk_prob": cfg.experts.is_renormalised,
        }
    return said


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    keys.only(raw, **UNREAD)
    experts, has_experts = read_experts(raw)
    window = raw if keys.flag(raw, "use_sliding_window", False) else {**raw, "sliding_window": None}
    has_bias = keys.flag(raw, "attention_bias", False)
    return {
        **read_rope(raw),
        **mistral.read_window(window, 4096, has_experts=has_experts),
        "experts": experts,
        "qkv_bias": has_bias,
        "o_bias": has_bias,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        **write_experts(cfg),
        **mistral.write_window(cfg),
        "use_sliding_window": cfg.sliding_window is not None,
        "attention_bias": cfg.qkv_bias,
    }


FORMAT = dataclasses.replace(
    qwen3.FORMAT,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    absent={
        **qwen3.FORMAT.absent,
        "head_dim": keys.head_dim(),
        "num_key_value_heads": keys.kv_heads(4),
        "rms_norm_eps": lambda raw: 1e-6,
    },
    fixed={"hidden_act": (("silu",), "silu")},
    implied={"qk_norm": True, "shifted_logits": True},
    extra={**qwen3.FORMAT.extra, "router_aux_loss_coef": 0.001},
    tensors={
        **qwen3.FORMAT.tensors,
        **MOE,
        "layers/attention/o_bias": llama.BIASES["layers/attention/o_bias"],
    },
    read=_read,
    write=_write,
    keys=(
        *(*KEYS, *MOE_KEYS, *UNREAD, "attention_bias"),
        *("use_sliding_window", "sliding_window", "layer_types"),
    ),
)
