"""What published checkpoints are made of: names of sizes, of tensors, and values taken for granted.

Tables only; `dlm.hf.weights` reads and writes with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from dlm.config import ModelConfig


def letter_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Size of each letter in `Stored.layout`."""
    return {
        "d": cfg.d_model,
        "n": cfg.n_heads,
        "k": cfg.n_kv_heads,
        "h": cfg.head_dim,
        "f": cfg.d_ff,
        "v": cfg.vocab_size,
    }


@dataclasses.dataclass(frozen=True)
class Stored:
    """How one parameter is stored: one tensor, or one per layer.

    Attributes:
      name: of the tensor; "{}" stands for the layer.
      layout: its dimensions, "->" ours (without L). "nh d -> nhd" is a matrix of N * H rows and D
        columns which we hold as [N, H, D]. Letters as in `dlm.models.decoder`.
    """

    name: str
    layout: str

    @property
    def stored(self) -> list[str]:
        """One group of letters per dimension of the tensor."""
        return self.layout.split(" -> ")[0].split()

    @property
    def ours(self) -> str:
        return self.layout.split(" -> ")[1]

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        """Of the stored tensor."""
        size = letter_sizes(cfg)
        return tuple(math.prod(size[letter] for letter in group) for group in self.stored)


@dataclasses.dataclass(frozen=True)
class Format:
    """One published format.

    Attributes:
      model_type: as config.json says it.
      architecture: likewise.
      fields: field of ModelConfig -> its key in config.json.
      absent: key -> its value where it is absent or null; other keys of `fields` must be there.
      fixed: key -> (values that the transformer here implements, value where it is absent). The
        latter are the defaults of the published code, even where nobody publishes such a model.
      implied: fields of ModelConfig that have one value in this format.
      extra: further entries of config.json that the published code wants to see.
      tensors: path of our leaf -> how it is stored.
      is_causal: an autoregressive model: it need not have a MASK token, its heads may have any
        width, and its rotary frequencies may be stretched (`rope_scaling`, `rope_parameters`).
    """

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    absent: Mapping[str, Callable[[dict[str, Any]], Any]]
    fixed: Mapping[str, tuple[tuple[Any, ...], Any]]
    implied: Mapping[str, Any]
    extra: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    is_causal: bool = False


LLADA = Format(
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
        "head_dim": lambda raw: raw["d_model"] // max(1, raw["n_heads"]),
        "mlp_hidden_size": lambda raw: raw.get("mlp_ratio", 4) * raw["d_model"],
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
)

# Dream is Qwen2 with bidirectional attention.
DREAM = Format(
    model_type="Dream",
    architecture="DreamModel",
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
    },
    fixed={
        "hidden_act": (("silu",), "silu"),
        "rope_scaling": ((None,), None),
        "use_mrope": ((False,), False),
        "use_sliding_window": ((False,), False),
    },
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
)

QWEN2 = dataclasses.replace(
    DREAM,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    absent={**DREAM.absent, "rope_theta": lambda raw: 10_000.0},
    fixed={"hidden_act": (("silu",), "silu"), "use_sliding_window": ((False,), False)},
    is_causal=True,
)

QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    absent={**QWEN2.absent, "head_dim": lambda raw: 128},
    fixed={**QWEN2.fixed, "attention_bias": ((False,), False)},
    implied={"qkv_bias": False, "qk_norm": True, "shifted_logits": True},
    tensors={
        **QWEN2.tensors,
        "layers/attention/q_norm": Stored("model.layers.{}.self_attn.q_norm.weight", "h -> h"),
        "layers/attention/k_norm": Stored("model.layers.{}.self_attn.k_norm.weight", "h -> h"),
    },
)

LLAMA = dataclasses.replace(
    QWEN2,
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={
        "hidden_act": (("silu",), "silu"),
        "attention_bias": ((False,), False),
        "mlp_bias": ((False,), False),
    },
    implied={"qkv_bias": False, "shifted_logits": True},
    extra={"attention_dropout": 0.0, "initializer_range": 0.02},
)

FORMATS = {form.model_type: form for form in (LLADA, DREAM, LLAMA, QWEN2, QWEN3)}
