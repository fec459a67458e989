"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import Experts, ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import mistral
from dlm.hf.rope import KEYS, read_rope, write_rope

MOE = "model.layers.{}.block_sparse_moe."


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    experts = Experts(
        num_experts=keys.one_of(raw, ("num_local_experts", "num_experts"), 8),
        num_chosen=keys.positive(raw, "num_experts_per_tok", 2),
        d_ff=raw["intermediate_size"],
    )
    return {
        **read_rope(raw, theta=1_000_000.0),
        **mistral.read_window(raw, has_experts=True),
        "experts": experts,
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    experts = keys.experts_of(cfg)
    return {
        **write_rope(cfg),
        **mistral.write_window(cfg),
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.num_chosen,
    }


FORMAT = dataclasses.replace(
    mistral.FORMAT,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    absent={**mistral.FORMAT.absent, "rms_norm_eps": lambda raw: 1e-5},
    extra={**mistral.FORMAT.extra, "router_aux_loss_coef": 0.001},
    tensors={
        **mistral.FORMAT.tensors,
        "layers/moe/router": Stored(MOE + "gate.weight", "e d -> ed"),
        "layers/moe/gate": Stored(MOE + "experts.{expert}.w1.weight", "g d -> edg"),
        "layers/moe/up": Stored(MOE + "experts.{expert}.w3.weight", "g d -> edg"),
        "layers/moe/down": Stored(MOE + "experts.{expert}.w2.weight", "d g -> egd"),
    },
    read=_read,
    write=_write,
    keys=(
        *(*KEYS, "sliding_window", "layer_types"),
        *("num_local_experts", "num_experts", "num_experts_per_tok"),
    ),
)
