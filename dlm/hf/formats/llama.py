"""Llama 3: neither biases nor norms of queries and keys."""

from __future__ import annotations

import dataclasses

from dlm.hf.formats import qwen2

FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={
        "hidden_act": (("silu",), "silu"),
        "attention_bias": ((False,), False),
        "mlp_bias": ((False,), False),
    },
    implied={"qkv_bias": False, "shifted_logits": True},
    extra={"attention_dropout": 0.0, "initializer_range": 0.02},
    has_mask=None,
)
