"""LLaDA: bidirectional, every position predicts its own token."""

from __future__ import annotations

from dlm.hf import keys
from dlm.hf.format import Format, Stored

FORMAT = Format(
    model_type="llada",
    architecture="LLaDAModelLM",
    fields={
        "d_model": "d_model",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "n_kv_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "d_ff": "mlp_hidden_size",
        "vocab_size": "embedding_size",  # rows; "vocab_size" may be smaller
        "max_seq_len": "max_sequence_length",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "qkv_bias": "include_qkv_bias",
        "tie_embeddings": "weight_tying",
    },
    absent={
        "n_kv_heads": lambda raw: raw["n_heads"],
        "head_dim": keys.head_dim("d_model", "n_heads"),
        "mlp_hidden_size": lambda raw: keys.positive(raw, "mlp_ratio", 4) * raw["d_model"],
        "embedding_size": lambda raw: raw.get("vocab_size"),
        "include_qkv_bias": lambda raw: False,
        "weight_tying": lambda raw: True,
    },
    fixed={
        "activation_type": (("silu",), "swiglu"),
        "alibi": ((False,), False),
        "attention_layer_norm": ((False,), False),
        "bias_for_layer_norm": ((False, None), None),
        "block_group_size": ((1,), 1),
        "block_type": (("llama",), "sequential"),
        "include_bias": ((False,), False),
        "input_emb_norm": ((False,), False),
        "layer_norm_type": (("rms",), "default"),
        "layer_norm_with_affine": ((True,), True),
        "multi_query_attention": ((None, False), None),
        "rope": ((True,), False),
        "rope_full_precision": ((True,), True),
        "rope_scaling": ((None,), None),
        "scale_logits": ((False,), False),
    },
    implied={"shifted_logits": False},
    extra={"attention_dropout": 0.0, "embedding_dropout": 0.0, "residual_dropout": 0.0},
    tensors={
        "embed": Stored("model.transformer.wte.weight", "v d -> vd"),
        "layers/attention_norm": Stored("model.transformer.blocks.{}.attn_norm.weight", "d -> d"),
        "layers/attention/q": Stored("model.transformer.blocks.{}.q_proj.weight", "nh d -> nhd"),
        "layers/attention/k": Stored("model.transformer.blocks.{}.k_proj.weight", "kh d -> khd"),
        "layers/attention/v": Stored("model.transformer.blocks.{}.v_proj.weight", "kh d -> khd"),
        "layers/attention/q_bias": Stored("model.transformer.blocks.{}.q_proj.bias", "nh -> nh"),
        "layers/attention/k_bias": Stored("model.transformer.blocks.{}.k_proj.bias", "kh -> kh"),
        "layers/attention/v_bias": Stored("model.transformer.blocks.{}.v_proj.bias", "kh -> kh"),
        "layers/attention/o": Stored("model.transformer.blocks.{}.attn_out.weight", "d nh -> nhd"),
        "layers/mlp_norm": Stored("model.transformer.blocks.{}.ff_norm.weight", "d -> d"),
        "layers/mlp/gate": Stored("model.transformer.blocks.{}.ff_proj.weight", "f d -> df"),
        "layers/mlp/up": Stored("model.transformer.blocks.{}.up_proj.weight", "f d -> df"),
        "layers/mlp/down": Stored("model.transformer.blocks.{}.ff_out.weight", "d f -> fd"),
        "final_norm": Stored("model.transformer.ln_f.weight", "d -> d"),
        "unembed": Stored("model.transformer.ff_out.weight", "v d -> vd"),
    },
    has_mask=True,
)
