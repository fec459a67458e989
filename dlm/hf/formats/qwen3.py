"""Qwen3: no biases, but norms of queries and keys."""

from __future__ import annotations

import dataclasses

from dlm.hf.format import Stored
from dlm.hf.formats import qwen2

FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    absent={**qwen2.FORMAT.absent, "head_dim": lambda raw: 128},
    fixed={**qwen2.FORMAT.fixed, "attention_bias": ((False,), False)},
    implied={"qkv_bias": False, "qk_norm": True, "shifted_logits": True},
    tensors={
        **qwen2.FORMAT.tensors,
        "layers/attention/q_norm": Stored("model.layers.{}.self_attn.q_norm.weight", "h -> h"),
        "layers/attention/k_norm": Stored("model.layers.{}.self_attn.k_norm.weight", "h -> h"),
    },
    has_mask=None,
)
