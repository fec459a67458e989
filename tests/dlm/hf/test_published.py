"""config.json files as people find them: all keys, those that say nothing included."""

import json

import pytest

from dlm.hf.files import read_config

# What most say.
COMMON = {
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.46.2",
}  # fmt: skip

# -> and the ends of a text.
PUBLISHED = {
    "Llama 2": (
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
            "torch_dtype": "float16", "vocab_size": 32000,
        },
        (2,),
    ),
    "SmolLM2": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
            "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
            "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
            "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
            "rope_theta": 100000, "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16",
            "fp16": "float16"}}, "vocab_size": 49152,
        },
        (2,),
    ),
    "Llama 3.2, repaired": (
        {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False,
            "bos_token_id": 128000, "eos_token_id": 128009, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
            "pad_token_id": 128004, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": True, "unsloth_fixed": True,
            "vocab_size": 128256,
        },
        (128009,),
    ),
    "Qwen 2.5": (
        {
            "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643,
            "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 1536,
            "intermediate_size": 8960, "max_position_embeddings": 32768,
            "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
            "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        (151645,),
    ),
    "R1 Distill": (
        {
            "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
            "intermediate_size": 18944, "max_position_embeddings": 131072,
            "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
            "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False,
            "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
        },
        (151643,),
    ),
    "Dream-Coder": (
        {
            "architectures": ["DreamModel"],
            "auto_map": {"AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel"}, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
            "intermediate_size": 18944, "mask_token_id": 151666,
            "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "Dream",
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "pad_token_id": 151643, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
            "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
        },
        (151643,),
    ),
    "Mistral": (
        {
            "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
            "tie_word_embeddings": False, "vocab_size": 32768,
        },
        (2,),
    ),
    "Phi 3": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1,
            "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
            "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
            "sliding_window": 2047, "tie_word_embeddings": False, "attention_bias": False,
            "vocab_size": 32064,
        },
        (32000,),
    ),
    "Gemma 2": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304, "intermediate_size": 9216, "max_position_embeddings": 8192,
            "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "vocab_size": 256000,
        },
        (1,),
    ),
    "Gemma 3": (
        {
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
            "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
            "intermediate_size": 6912, "max_position_embeddings": 32768,
            "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        (1, 106),
    ),
    "Qwen 3, experts": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
            "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
            "intermediate_size": 6144, "max_position_embeddings": 40960,
            "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
            "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
            "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        (151645,),
    ),
    "GPT-2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
            "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
            "summary_activation": None, "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        (50256,),
    ),
    "SmolLM3": (
        {
            "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
            "bos_token_id": None, "eos_token_id": 128012, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] *
            36, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False,
            "model_type": "smollm3", "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]
            * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
            "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
            "use_cache": False, "use_sliding_window": False, "vocab_size": 128256,
        },
        (128012,),
    ),
    "LLaDA2": (
        {
            "architectures": ["LLaDA2MoeModelLM"], "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
            "embedding_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120,
            "max_position_embeddings": 32768, "max_window_layers": 28,
            "model_type": "llada2_moe", "moe_intermediate_size": 512,
            "moe_router_enable_expert_bias": True, "n_group": 8, "norm_head": False,
            "norm_softmax": False, "norm_topk_prob": True, "num_attention_heads": 16,
            "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20,
            "num_key_value_heads": 4, "num_shared_experts": 1, "output_dropout": 0.0,
            "output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 64,
            "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid",
            "tie_word_embeddings": False, "topk_group": 4, "use_bias": False,
            "use_qkv_bias": False, "use_rmsnorm": True, "use_sliding_window": False,
            "using_split_qkv_in_self_attention": False, "vocab_size": 157184,
        },
        (156892,),
    ),
    "LLaDA-MoE, as a public trainer writes it": (
        {
            "architectures": ["LLaDAMoEModelLM"], "attention_bias": False, "auto_map": {
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM"}, "clip_qkv": None,
            "dense_intermediate_size": 8192, "eos_token_id": 156892,
            "expert_intermediate_size": 1024, "hidden_act": "silu", "hidden_size": 2048,
            "max_position_embeddings": 8192, "model_type": "lladamoe",
            "moe_layer_freq": [1] * 16, "norm_topk_prob": None, "num_attention_heads": 16,
            "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
            "num_key_value_heads": 16, "pad_token_id": 156892, "partial_rotary_factor": 1,
            "qk_layernorm": True, "rms_norm_eps": 1e-05, "rope_theta": 50000,
            "tie_word_embeddings": False, "vocab_size": 157184,
        },
        (156892,),
    ),
    "Fast-dLLM v2": (
        {
            "architectures": ["Fast_dLLM_QwenForCausalLM"], "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"}, "bd_size": 32,
            "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
            "hidden_size": 1536, "intermediate_size": 8960, "layer_types": ["full_attention"] *
            28, "max_position_embeddings": 32768, "max_window_layers": 21,
            "model_type": "Fast_dLLM_Qwen", "num_attention_heads": 12, "num_hidden_layers": 28,
            "num_key_value_heads": 2, "pad_token_id": 151645, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        (151645,),
    ),
    "Gemma 2, larger": (
        {
            "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
            "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
            "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192,
            "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42,
            "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
            "sliding_window_size": 4096, "vocab_size": 256000,
        },
        (1,),
    ),
    "Qwen 3 Coder": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
            "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5472,
            "max_position_embeddings": 262144, "max_window_layers": 28, "mlp_only_layers": [],
            "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
            "qkv_bias": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 10000000, "router_aux_loss_coef": 0.0,
            "shared_expert_intermediate_size": 0, "sliding_window": None,
            "tie_word_embeddings": False, "use_qk_norm": True, "use_sliding_window": False,
            "vocab_size": 151936,
        },
        (151645,),
    ),
    "Falcon 3": (
        {
            "activation": "swiglu", "architectures": ["LlamaForCausalLM"],
            "attention_bias": False, "eos_token_id": 11, "head_dim": 256, "hidden_act": "silu",
            "hidden_size": 3072, "intermediate_size": 23040, "max_position_embeddings": 32768,
            "mlp_bias": False, "model_type": "llama", "num_attention_heads": 12,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "pretraining_tp": 1,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000042,
            "tie_word_embeddings": False, "vocab_size": 131072,
        },
        (11,),
    ),
    "Llama 2, stretched by YaRN": (
        {
            "architectures": ["LlamaForCausalLM"], "auto_map": {
            "AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 11008, "max_position_embeddings": 65536, "model_type": "llama",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 16.0, "finetuned": True,
            "original_max_position_embeddings": 4096, "type": "yarn"},
            "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 32000,
        },
        (2,),
    ),
    "Vicuna 33B": (  # says nothing of its positions that its code reads
        {
            "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "hidden_size": 6656, "intermediate_size": 17920,
            "max_sequence_length": 2048, "model_type": "llama", "num_attention_heads": 52,
            "num_hidden_layers": 60, "pad_token_id": 0, "rms_norm_eps": 1e-06,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        (2,),
    ),
    "GPT-2 medium": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
            "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 1024,
            "n_head": 16, "n_layer": 24, "n_positions": 1024, "n_special": 0,
            "output_past": True, "predict_special_tokens": True, "resid_pdrop": 0.1,
            "summary_activation": None, "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True, "summary_type": "cls_index",
            "summary_use_proj": True, "vocab_size": 50257,
        },
        (50256,),
    ),
    "DistilGPT-2": (
        {
            "_num_labels": 1, "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
            "embd_pdrop": 0.1, "eos_token_id": 50256, "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0}, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
            "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 6, "n_positions": 1024,
            "resid_pdrop": 0.1, "vocab_size": 50257,
        },
        (50256,),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "ends"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_configs_as_they_are_published(tmp_path, raw, ends):
    (tmp_path / "config.json").write_text(json.dumps(COMMON | raw))
    assert read_config(tmp_path).eos_ids == ends
