"""OLMo 2: norms behind attention and MLP, queries and keys normalised over all heads at once."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import llama, olmoe
from dlm.hf.rope import KEYS, read_rope, write_rope

LAYER = "model.layers.{}."


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    has_bias = keys.flag(raw, "attention_bias", False)
    return {**read_rope(raw), "qkv_bias": has_bias, "o_bias": has_bias}


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {**write_rope(cfg), "attention_bias": cfg.qkv_bias}


FORMAT = dataclasses.replace(
    llama.FORMAT,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    absent={**llama.FORMAT.absent, "rms_norm_eps": lambda raw: 1e-5},
    implied={
        "norm_places": "after",
        "qk_norm": True,
        "joint_qk_norm": True,
        "shifted_logits": True,
    },
    tensors={
        **llama.FORMAT.tensors,
        **olmoe.JOINT_NORMS,
        "layers/attention_out_norm": Stored(LAYER + "post_attention_layernorm.weight", "d -> d"),
        "layers/mlp_out_norm": Stored(LAYER + "post_feedforward_layernorm.weight", "d -> d"),
    },
    read=_read,
    write=_write,
    keys=(*KEYS, "attention_bias"),
)
