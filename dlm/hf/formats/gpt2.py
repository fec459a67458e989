"""GPT-2: learned positions, LayerNorm, a plain MLP, biases everywhere, matrices input-first."""

from __future__ import annotations

from typing import Any

from dlm.hf import keys
from dlm.hf.format import Format, Stored

LAYER, QKV = "transformer.h.{}.", ("nh", "kh", "kh")
C_ATTN = LAYER + "attn.c_attn."


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    return {"n_kv_heads": raw["n_head"], "head_dim": keys.head_dim("n_embd", "n_head")(raw)}


FORMAT = Format(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    absent={
        "n_inner": lambda raw: 4 * raw["n_embd"],
        "layer_norm_epsilon": lambda raw: 1e-5,
        "tie_word_embeddings": lambda raw: True,
    },
    fixed={
        "activation_function": (("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
        "add_cross_attention": ((False,), False),
        "reorder_and_upcast_attn": (
            (False, True),
            False,
        ),  # of float16: not how it is computed here
        "scale_attn_by_inverse_layer_idx": ((False,), False),
        "scale_attn_weights": ((True,), True),
    },
    implied={
        "shifted_logits": True,
        "norm": "layer",
        "activation": "gelu_tanh",
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "learned_positions": True,
        "pattern": ("dense global none",),
    },
    extra={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02},
    tensors={
        "embed": Stored("transformer.wte.weight", "v d -> vd"),
        "positions": Stored("transformer.wpe.weight", "p d -> pd"),
        "layers/attention_norm": Stored(LAYER + "ln_1.weight", "d -> d"),
        "layers/attention_norm_bias": Stored(LAYER + "ln_1.bias", "d -> d"),
        "layers/attention/q": Stored(C_ATTN + "weight", "d nh -> nhd", QKV, 0),
        "layers/attention/k": Stored(C_ATTN + "weight", "d kh -> khd", QKV, 1),
        "layers/attention/v": Stored(C_ATTN + "weight", "d kh -> khd", QKV, 2),
        "layers/attention/q_bias": Stored(C_ATTN + "bias", "nh -> nh", QKV, 0),
        "layers/attention/k_bias": Stored(C_ATTN + "bias", "kh -> kh", QKV, 1),
        "layers/attention/v_bias": Stored(C_ATTN + "bias", "kh -> kh", QKV, 2),
        "layers/attention/o": Stored(LAYER + "attn.c_proj.weight", "nh d -> nhd"),
        "layers/attention/o_bias": Stored(LAYER + "attn.c_proj.bias", "d -> d"),
        "layers/mlp_norm": Stored(LAYER + "ln_2.weight", "d -> d"),
        "layers/mlp_norm_bias": Stored(LAYER + "ln_2.bias", "d -> d"),
        "layers/mlp/up": Stored(LAYER + "mlp.c_fc.weight", "d f -> df"),
        "layers/mlp/up_bias": Stored(LAYER + "mlp.c_fc.bias", "f -> f"),
        "layers/mlp/down": Stored(LAYER + "mlp.c_proj.weight", "f d -> fd"),
        "layers/mlp/down_bias": Stored(LAYER + "mlp.c_proj.bias", "d -> d"),
        "final_norm": Stored("transformer.ln_f.weight", "d -> d"),
        "final_norm_bias": Stored("transformer.ln_f.bias", "d -> d"),
        "unembed": Stored("lm_head.weight", "v d -> vd"),
    },
    is_causal=True,
    read=_read,
    ignored=("attn.bias", "attn.masked_bias"),  # masks that old files carry
    prefix="transformer.",
)
