"""LLaDA2.0 and 2.1: block diffusion with experts, whose router scores by sigmoid and in groups.

The first layers are dense. Queries and keys are always normalised, whatever `use_qk_norm` says, and
the weights of the chosen experts always renormalised.
"""

from __future__ import annotations

from typing import Any

from dlm.config import Experts, ModelConfig
from dlm.hf import keys
from dlm.hf.format import Format, Stored
from dlm.hf.formats import qwen3, qwen3_moe
from dlm.hf.rope import KEYS, read_rope, write_rope

LAYER, QKV = "model.layers.{}.", ("nh", "kh", "kh")
SHARED_WIDTH = "moe_shared_expert_intermediate_size"
FUSED, SHARED = LAYER + "attention.query_key_value.weight", LAYER + "mlp.shared_experts."


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    layers, dense = raw["num_hidden_layers"], keys.whole(raw, "first_k_dense_replace") or 0
    if dense < 0:
        raise ValueError(f"first_k_dense_replace={dense} must be at least 0")
    width = keys.required(raw, "moe_intermediate_size")
    scale = keys.number(raw, "routed_scaling_factor")
    experts = Experts(
        num_experts=keys.required(raw, "num_experts"),
        num_chosen=keys.required(raw, "num_experts_per_tok"),
        d_ff=width,
        scores="sigmoid",
        bias="choose",
        num_groups=keys.whole(raw, "n_group") or 1,
        num_chosen_groups=keys.whole(raw, "topk_group") or 1,
        scale=float(1.0 if scale is None else scale),
        shared_d_ff=width * (keys.whole(raw, "num_shared_experts") or 0),
    )
    if keys.whole(raw, SHARED_WIDTH, width) not in (width, None):
        raise ValueError(f"{SHARED_WIDTH}={raw[SHARED_WIDTH]} must be {width}, as of other experts")
    said = read_rope(raw, theta=600_000.0, is_partial=True)
    rotated = keys.whole(raw, "rotary_dim")
    found = raw["head_dim"] if said["rotary_dim"] is None else said["rotary_dim"]
    if rotated not in (None, found):
        raise ValueError(f"rotary_dim={rotated} and partial_rotary_factor must say the same")
    return {
        **said,
        "experts": experts,
        "pattern": keys.pattern(layers, has_experts=[i >= dense for i in range(layers)]),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    experts = keys.experts_of(cfg)
    return {
        **write_rope(cfg),
        "rope_scaling": None,
        "rotary_dim": cfg.rotary_width,
        "first_k_dense_replace": cfg.kinds("mlp").count("dense"),
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_chosen,
        "moe_intermediate_size": experts.d_ff,
        "n_group": experts.num_groups,
        "topk_group": experts.num_chosen_groups,
        "routed_scaling_factor": experts.scale,
        "num_shared_experts": experts.shared_d_ff // experts.d_ff or None,
    }


FORMAT = Format(
    model_type="llada2_moe",
    architecture="LLaDA2MoeModelLM",
    fields=qwen3.FORMAT.fields,
    absent={
        **qwen3.FORMAT.absent,
        "head_dim": keys.head_dim(),
    },
    fixed={
        "hidden_act": (("silu",), "silu"),
        "moe_router_enable_expert_bias": ((True,), True),
        "norm_head": ((False,), False),
        "norm_softmax": ((False,), False),
        "norm_topk_prob": ((True,), True),
        "rope_scaling": ((None,), None),
        "router_dtype": (("fp32",), "fp32"),
        "score_function": (("sigmoid",), "sigmoid"),
        "use_bias": ((False,), False),
        "use_qk_norm": ((True, False), True),  # the published code never asks
        "use_qkv_bias": ((False,), False),
        "use_rmsnorm": ((True,), True),
        "using_split_qkv_in_self_attention": ((False,), False),
        "use_sliding_window": ((False,), False),
    },
    implied={"qk_norm": True, "shifted_logits": False, "block_len": 32},
    extra={"attention_dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0},
    tensors={
        **{leaf: stored for leaf, stored in qwen3.FORMAT.tensors.items() if "bias" not in leaf},
        **qwen3_moe.MOE,
        "embed": Stored("model.word_embeddings.weight", "v d -> vd"),
        "layers/attention/q": Stored(FUSED, "nh d -> nhd", QKV, 0),
        "layers/attention/k": Stored(FUSED, "kh d -> khd", QKV, 1),
        "layers/attention/v": Stored(FUSED, "kh d -> khd", QKV, 2),
        "layers/attention/q_norm": Stored(LAYER + "attention.query_layernorm.weight", "h -> h"),
        "layers/attention/k_norm": Stored(LAYER + "attention.key_layernorm.weight", "h -> h"),
        "layers/attention/o": Stored(LAYER + "attention.dense.weight", "d nh -> nhd"),
        "layers/moe/bias": Stored(LAYER + "mlp.gate.expert_bias", "e -> e"),
        "layers/moe/shared/gate": Stored(SHARED + "gate_proj.weight", "s d -> ds"),
        "layers/moe/shared/up": Stored(SHARED + "up_proj.weight", "s d -> ds"),
        "layers/moe/shared/down": Stored(SHARED + "down_proj.weight", "d s -> sd"),
    },
    # "<|mask|>" and "<|endoftext|>", where only the tokenizer names them
    default_ids={"mask_token_id": 156895, "eos_token_id": 156892},
    is_causal=True,
    has_mask=True,
    read=_read,
    write=_write,
    keys=(
        *(*KEYS, "rotary_dim", "first_k_dense_replace", "num_experts", "num_experts_per_tok"),
        *("moe_intermediate_size", "n_group", "topk_group", "routed_scaling_factor"),
        *("num_shared_experts", SHARED_WIDTH),
    ),
)
