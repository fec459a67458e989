"""Qwen2 and Qwen2.5, with biases; one with a MASK token is Dream's.

With `use_sliding_window` the layers from `max_window_layers` on are sliding, or those that
`layer_types` lists.
"""

from __future__ import annotations

from typing import Any

from dlm.config import ModelConfig
from dlm.hf import keys
from dlm.hf.format import Format, Stored
from dlm.hf.rope import KEYS, read_rope, write_rope


def read_sliding(raw: dict[str, Any]) -> dict[str, Any]:
    """The window and the pattern."""
    layers, first = raw["num_hidden_layers"], keys.whole(raw, "max_window_layers")
    first = 28 if first is None else first
    window = keys.whole(raw, "sliding_window", 4096)
    if not keys.flag(raw, "use_sliding_window", False):
        window = None
    absent = [window is not None and i >= first for i in range(layers)]
    window, is_sliding = keys.sliding_layers(raw, layers, window, absent)
    return {"sliding_window": window, "pattern": keys.pattern(layers, is_sliding=is_sliding)}


def write_sliding(cfg: ModelConfig) -> dict[str, Any]:
    """Keys that `read_sliding` reads."""
    is_sliding = [kind == "sliding" for kind in cfg.kinds("attention")]
    if not any(is_sliding):
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": is_sliding.index(True),
        "layer_types": keys.layer_types(is_sliding),
    }


SLIDING_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

FORMAT = Format(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields={
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    absent={
        "num_key_value_heads": lambda raw: raw["num_attention_heads"],
        "head_dim": keys.head_dim(),
        "tie_word_embeddings": lambda raw: False,
    },
    fixed={"hidden_act": (("silu",), "silu")},
    implied={"qkv_bias": True, "shifted_logits": True},
    extra={"attention_dropout": 0.0, "initializer_range": 0.02},
    tensors={
        "embed": Stored("model.embed_tokens.weight", "v d -> vd"),
        "layers/attention_norm": Stored("model.layers.{}.input_layernorm.weight", "d -> d"),
        "layers/attention/q": Stored("model.layers.{}.self_attn.q_proj.weight", "nh d -> nhd"),
        "layers/attention/k": Stored("model.layers.{}.self_attn.k_proj.weight", "kh d -> khd"),
        "layers/attention/v": Stored("model.layers.{}.self_attn.v_proj.weight", "kh d -> khd"),
        "layers/attention/q_bias": Stored("model.layers.{}.self_attn.q_proj.bias", "nh -> nh"),
        "layers/attention/k_bias": Stored("model.layers.{}.self_attn.k_proj.bias", "kh -> kh"),
        "layers/attention/v_bias": Stored("model.layers.{}.self_attn.v_proj.bias", "kh -> kh"),
        "layers/attention/o": Stored("model.layers.{}.self_attn.o_proj.weight", "d nh -> nhd"),
        "layers/mlp_norm": Stored("model.layers.{}.post_attention_layernorm.weight", "d -> d"),
        "layers/mlp/gate": Stored("model.layers.{}.mlp.gate_proj.weight", "f d -> df"),
        "layers/mlp/up": Stored("model.layers.{}.mlp.up_proj.weight", "f d -> df"),
        "layers/mlp/down": Stored("model.layers.{}.mlp.down_proj.weight", "d f -> fd"),
        "final_norm": Stored("model.norm.weight", "d -> d"),
        "unembed": Stored("lm_head.weight", "v d -> vd"),
    },
    is_causal=True,
    has_mask=False,
    read=lambda raw: {**read_rope(raw), **read_sliding(raw)},
    write=lambda cfg: {**write_rope(cfg), **write_sliding(cfg)},
    keys=(*KEYS, *SLIDING_KEYS),
)
