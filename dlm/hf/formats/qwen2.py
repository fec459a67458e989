"""Qwen2 and Qwen2.5, with biases; one with a MASK token is Dream's."""

from __future__ import annotations

from dlm.hf.format import Format, Stored

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
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
    },
    absent={
        "num_key_value_heads": lambda raw: raw["num_attention_heads"],
        "head_dim": lambda raw: raw["hidden_size"] // max(1, raw["num_attention_heads"]),
        "tie_word_embeddings": lambda raw: False,
        "rope_theta": lambda raw: 10_000.0,
    },
    fixed={"hidden_act": (("silu",), "silu"), "use_sliding_window": ((False,), False)},
    implied={"qkv_bias": True, "shifted_logits": True},
    extra={"attention_dropout": 0.0, "initializer_range": 0.02, "sliding_window": None},
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
)
