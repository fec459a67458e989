"""Gemma 2: norms around attention and MLP, every other layer sliding, caps of scores and logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import Stored
from dlm.hf.formats import qwen2
from dlm.hf.rope import KEYS, read_rope, write_rope

LAYER = "model.layers.{}."
READ = (
    *(*KEYS, "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
SIZE = "sliding_window_size"  # which larger models give besides
NORMS = {  # the second norm of others is the MLP's first; here it is attention's second
    "layers/attention_out_norm": Stored(LAYER + "post_attention_layernorm.weight", "d -> d"),
    "layers/mlp_norm": Stored(LAYER + "pre_feedforward_layernorm.weight", "d -> d"),
    "layers/mlp_out_norm": Stored(LAYER + "post_feedforward_layernorm.weight", "d -> d"),
}


def read_scales(raw: dict[str, Any]) -> dict[str, Any]:
    """What embeddings and scores are multiplied by."""
    before = keys.number(raw, "query_pre_attn_scalar", 256)
    if before is None or not before > 0:
        raise ValueError(f"query_pre_attn_scalar={before!r} must be positive")
    return {"embed_scale": raw["hidden_size"] ** 0.5, "attention_scale": before**-0.5}


def write_scales(cfg: ModelConfig) -> dict[str, Any]:
    """The key that `read_scales` reads."""
    scale = cfg.head_dim**-0.5 if cfg.attention_scale is None else cfg.attention_scale
    before = min(1 / scale / scale, 1e300)
    return {
        "query_pre_attn_scalar": round(before) if abs(before - round(before)) < 1e-6 else before
    }


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    layers = raw["num_hidden_layers"]
    window = keys.whole(raw, "sliding_window", 4096)
    if keys.whole(raw, SIZE, window) not in (window, None):
        raise ValueError(f"{SIZE}={raw[SIZE]} must be sliding_window={window}, or left out")
    every_other = [i % 2 == 0 for i in range(layers)]
    window, is_sliding = keys.sliding_layers(raw, layers, window, every_other)
    return {
        **read_rope(raw),
        **read_scales(raw),
        "sliding_window": window,
        "pattern": keys.pattern(layers, is_sliding=is_sliding),
        "attention_cap": keys.number(raw, "attn_logit_softcapping", 50.0),
        "logit_cap": keys.number(raw, "final_logit_softcapping", 30.0),
    }


def _write(cfg: ModelConfig) -> dict[str, Any]:
    return {
        **write_rope(cfg),
        **write_scales(cfg),
        "sliding_window": cfg.sliding_window,
        "layer_types": keys.layer_types([kind == "sliding" for kind in cfg.kinds("attention")]),
        "attn_logit_softcapping": cfg.attention_cap,
        "final_logit_softcapping": cfg.logit_cap,
    }


FORMAT = dataclasses.replace(
    qwen2.FORMAT,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    absent={
        **qwen2.FORMAT.absent,
        "head_dim": lambda raw: 256,
        "num_key_value_heads": keys.kv_heads(4),
        "rms_norm_eps": lambda raw: 1e-6,
        "tie_word_embeddings": lambda raw: True,
    },
    fixed={
        "hidden_activation": (("gelu_pytorch_tanh",), "gelu_pytorch_tanh"),
        "attention_bias": ((False,), False),
        "use_bidirectional_attention": ((False, None), None),
    },
    implied={
        "shifted_logits": True,
        "norm": "rms_offset",
        "norm_places": "around",
        "activation": "gelu_tanh",
    },
    # `hidden_act` is in files, with any value, and read by nobody.
    extra={"attention_dropout": 0.0, "initializer_range": 0.02, "hidden_act": "gelu_pytorch_tanh"},
    tensors={**qwen2.FORMAT.tensors, **NORMS},
    has_mask=None,
    read=_read,
    write=_write,
    keys=(*READ, SIZE),
)
