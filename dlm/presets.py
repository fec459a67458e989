"""The exact numbers of published models."""

from __future__ import annotations

from typing import Any

from dlm import rope
from dlm.config import Experts, ModelConfig


def _llama3(**sizes: Any) -> ModelConfig:
    factor = sizes.pop("factor")
    scaling = rope.Llama3(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
    )
    return ModelConfig(
        **sizes,
        vocab_size=128_256,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=scaling,
        shifted_logits=True,
        eos_token_id=128_009,
        more_eos_ids=(128_001, 128_008),
        bos_token_id=128_000,
        pad_token_id=128_009,
    )


def _qwen(**own: Any) -> ModelConfig:
    family: dict[str, Any] = {
        "rope_theta": 1_000_000.0,
        "norm_eps": 1e-6,
        "shifted_logits": True,
        "eos_token_id": 151_645,
        "more_eos_ids": (151_643,),
        "pad_token_id": 151_643,
    }
    return ModelConfig(**(family | own))


def _sdar(**sizes: Any) -> ModelConfig:
    return _qwen(
        **sizes, n_kv_heads=8, head_dim=128, vocab_size=151_936, max_seq_len=32_768, qk_norm=True,
        shifted_logits=False, mask_token_id=151_669, eos_token_id=151_643,
        more_eos_ids=(151_645,), block_len=4,
    )  # fmt: skip


def _fast_dllm_v2(**sizes: Any) -> ModelConfig:
    return _qwen(
        **sizes, head_dim=128, max_seq_len=32_768, qkv_bias=True, mask_token_id=151_665,
        more_eos_ids=(), pad_token_id=151_645, block_len=32,
    )  # fmt: skip


def _gemma(**sizes: Any) -> ModelConfig:
    """Of Gemma 2, and what Gemma 3 shares."""
    shared: dict[str, Any] = {
        "head_dim": 256, "norm_eps": 1e-6, "norm": "rms_offset", "norm_places": "around",
        "activation": "gelu_tanh", "attention_scale": 256**-0.5, "tie_embeddings": True,
        "embed_scale": sizes["d_model"] ** 0.5, "shifted_logits": True,
        "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return ModelConfig(**shared | sizes)


def _gemma2(**sizes: Any) -> ModelConfig:
    return _gemma(
        **sizes, vocab_size=256_000, max_seq_len=8192, sliding_window=4096,
        pattern=("dense sliding rotary", "dense global rotary"), attention_cap=50.0, logit_cap=30.0,
    )  # fmt: skip


def _gemma3(**sizes: Any) -> ModelConfig:
    return _gemma(
        **sizes, qk_norm=True, rope_theta=1_000_000.0, local_rope_theta=10_000.0,
        pattern=(*["dense sliding rotary"] * 5, "dense global rotary"), more_eos_ids=(106,),
    )  # fmt: skip


def _llada2(**sizes: Any) -> ModelConfig:
    width = sizes.pop("expert_d_ff")
    return ModelConfig(
        **sizes, n_kv_heads=4, head_dim=128, vocab_size=157_184, rope_theta=600_000.0,
        rotary_dim=64, norm_eps=1e-6, qk_norm=True, mask_token_id=156_895, eos_token_id=156_892,
        pad_token_id=156_892, block_len=32, never_causal=True,
        pattern=("dense global rotary", *["experts global rotary"] * (sizes["n_layers"] - 1)),
        experts=Experts(
            num_experts=256, num_chosen=8, d_ff=width, scores="sigmoid", bias="choose",
            num_groups=8, num_chosen_groups=4, scale=2.5, shared_d_ff=width,
        ),
    )  # fmt: skip


EXPERTS_ONLY = ("experts global rotary",)
QWEN3_EXPERTS = Experts(num_experts=128, num_chosen=8, d_ff=768)

# Published models. LLaDA: arXiv 2502.09992; Dream: arXiv 2508.15487 (the sizes of Qwen2.5-7B);
# Llama 3: arXiv 2407.21783; Qwen2.5: arXiv 2412.15115; Qwen3: arXiv 2505.09388; these three as
# instruction-tuned. SDAR: arXiv 2510.06303; Fast-dLLM v2: arXiv 2509.26328; Stable-DiffCoder: arXiv
# 2601.15892; Tiny-A2D: Qwen3 without its mask. With experts, LLaDA-MoE: arXiv 2509.24389; LLaDA2:
# arXiv 2512.15745; Mixtral: arXiv 2401.04088; OLMoE: arXiv 2409.02060. Mistral (the first):
# arXiv 2310.06825; Gemma 2: arXiv 2408.00118; Gemma 3, text only: arXiv 2503.19786; Phi-3: arXiv
# 2404.14219; SmolLM2: arXiv 2502.02737; SmolLM3 and GPT-2 as their authors' pages say.
# `tiny` is for tests and for looking at shapes: it has every size, and no meaning.
PRESETS: dict[str, ModelConfig] = {
    "llada_8b": ModelConfig(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        d_ff=12288,
        vocab_size=126464,
        max_seq_len=4096,
        rope_theta=500_000.0,
        norm_eps=1e-5,
        mask_token_id=126336,
        eos_token_id=126081,
        bos_token_id=126080,
        pad_token_id=126081,
    ),
    "dream_7b": ModelConfig(
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        d_ff=18944,
        vocab_size=152064,
        max_seq_len=2048,  # usable context according to the authors; positions go further
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qkv_bias=True,
        shifted_logits=True,
        mask_token_id=151666,
        eos_token_id=151643,
        bos_token_id=151665,
        pad_token_id=151643,
    ),
    "llama3_1_8b": _llama3(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336, factor=8.0
    ),
    "llama3_2_1b": _llama3(
        d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192, factor=32.0,
        tie_embeddings=True,
    ),
    "qwen2_5_0_5b": _qwen(
        d_model=896, n_layers=24, n_heads=14, n_kv_heads=2, head_dim=64, d_ff=4864,
        vocab_size=151_936, max_seq_len=32_768, qkv_bias=True, tie_embeddings=True,
    ),
    "qwen2_5_7b": _qwen(
        d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128, d_ff=18944,
        vocab_size=152_064, max_seq_len=32_768, qkv_bias=True,
    ),
    "qwen3_0_6b": _qwen(
        d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=3072,
        vocab_size=151_936, max_seq_len=40_960, qk_norm=True, tie_embeddings=True,
    ),
    "qwen3_8b": _qwen(
        d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=12288,
        vocab_size=151_936, max_seq_len=40_960, qk_norm=True,
    ),
    "sdar_1_7b": _sdar(d_model=2048, n_layers=28, n_heads=16, d_ff=6144),
    "sdar_4b": _sdar(d_model=2560, n_layers=36, n_heads=32, d_ff=9728),
    "sdar_8b": _sdar(d_model=4096, n_layers=36, n_heads=32, d_ff=12288),
    "fast_dllm_v2_1_5b": _fast_dllm_v2(
        d_model=1536, n_layers=28, n_heads=12, n_kv_heads=2, d_ff=8960, vocab_size=151_936,
        tie_embeddings=True,
    ),
    "fast_dllm_v2_7b": _fast_dllm_v2(
        d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, d_ff=18944, vocab_size=152_064,
    ),
    "stable_diffcoder_8b": ModelConfig(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
        vocab_size=155_136, max_seq_len=8192, rope_theta=500_000.0, norm_eps=1e-6,
        mask_token_id=5, eos_token_id=2, bos_token_id=0, pad_token_id=1, block_len=4,
    ),
    "a2d_qwen3_0_6b": _qwen(
        d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128, d_ff=3072,
        vocab_size=151_936, max_seq_len=40_960, qk_norm=True, tie_embeddings=True,
        shifted_logits=False, mask_token_id=151_669,
    ),
    "sdar_30b_a3b": _qwen(
        d_model=2048, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, d_ff=6144,
        vocab_size=151_936, max_seq_len=40_960, qk_norm=True, shifted_logits=False,
        mask_token_id=151_669, eos_token_id=151_643, more_eos_ids=(151_645,), block_len=4,
        never_causal=True, pattern=EXPERTS_ONLY, experts=QWEN3_EXPERTS,
    ),
    "llada_moe_7b_a1b": ModelConfig(
        d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128, d_ff=8192,
        vocab_size=157_184, max_seq_len=8192, rope_theta=50_000.0, norm_eps=1e-5, qk_norm=True,
        mask_token_id=156_895, eos_token_id=156_892, pad_token_id=156_892, never_causal=True,
        pattern=EXPERTS_ONLY,
        experts=Experts(num_experts=64, num_chosen=8, d_ff=1024, is_renormalised=False),
    ),
    "llada2_mini": _llada2(
        d_model=2048, n_layers=20, n_heads=16, d_ff=5120, expert_d_ff=512, max_seq_len=32_768
    ),
    "llada2_flash": _llada2(
        d_model=4096, n_layers=32, n_heads=32, d_ff=9216, expert_d_ff=1024, max_seq_len=16_384
    ),
    "qwen3_30b_a3b": _qwen(
        d_model=2048, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, d_ff=6144,
        vocab_size=151_936, max_seq_len=40_960, qk_norm=True, pattern=EXPERTS_ONLY,
        experts=QWEN3_EXPERTS,
    ),
    "mistral_7b": ModelConfig(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
        vocab_size=32_000, max_seq_len=32_768, sliding_window=4096, shifted_logits=True,
        eos_token_id=2, bos_token_id=1, pad_token_id=2, pattern=("dense sliding rotary",),
    ),
    "mixtral_8x7b": ModelConfig(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, d_ff=14336,
        vocab_size=32_000, max_seq_len=32_768, rope_theta=1_000_000.0, shifted_logits=True,
        eos_token_id=2, bos_token_id=1, pad_token_id=2, pattern=EXPERTS_ONLY,
        experts=Experts(num_experts=8, num_chosen=2, d_ff=14336),
    ),
    "olmoe_1b_7b": ModelConfig(
        d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128, d_ff=1024,
        vocab_size=50_304, max_seq_len=4096, qk_norm=True, joint_qk_norm=True, shifted_logits=True,
        eos_token_id=50_279, pad_token_id=1, pattern=EXPERTS_ONLY,
        experts=Experts(num_experts=64, num_chosen=8, d_ff=1024, is_renormalised=False),
    ),
    "gemma2_2b": _gemma2(d_model=2304, n_layers=26, n_heads=8, n_kv_heads=4, d_ff=9216),
    "gemma2_9b": _gemma2(d_model=3584, n_layers=42, n_heads=16, n_kv_heads=8, d_ff=14336),
    "gemma3_1b": _gemma3(
        d_model=1152, n_layers=26, n_heads=4, n_kv_heads=1, d_ff=6912, vocab_size=262_144,
        max_seq_len=32_768, sliding_window=512,
    ),
    "gemma3_4b": _gemma3(
        d_model=2560, n_layers=34, n_heads=8, n_kv_heads=4, d_ff=10240, vocab_size=262_208,
        max_seq_len=131_072, sliding_window=1024, rope_scaling=rope.Linear(factor=8.0),
    ),
    "phi3_mini_4k": ModelConfig(
        d_model=3072, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=96, d_ff=8192,
        vocab_size=32_064, max_seq_len=4096, sliding_window=2047, shifted_logits=True,
        eos_token_id=32_000, bos_token_id=1, pad_token_id=32_000, family="Phi3ForCausalLM",
        pattern=("dense sliding rotary",),
    ),
    "smollm2_135m": ModelConfig(
        d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536,
        vocab_size=49_152, max_seq_len=8192, rope_theta=100_000.0, tie_embeddings=True,
        shifted_logits=True, eos_token_id=2, bos_token_id=1, pad_token_id=2,
    ),
    "smollm3_3b": ModelConfig(
        d_model=2048, n_layers=36, n_heads=16, n_kv_heads=4, head_dim=128, d_ff=11008,
        vocab_size=128_256, max_seq_len=65_536, rope_theta=5_000_000.0, norm_eps=1e-6,
        tie_embeddings=True, shifted_logits=True, eos_token_id=128_012, pad_token_id=128_012,
        pattern=(*["dense global rotary"] * 3, "dense global none"),
    ),
    "gpt2": ModelConfig(
        d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, d_ff=3072,
        vocab_size=50_257, max_seq_len=1024, norm="layer", qkv_bias=True, o_bias=True,
        mlp_bias=True, activation="gelu_tanh", gated=False, learned_positions=True,
        tie_embeddings=True, shifted_logits=True, eos_token_id=50_256, pad_token_id=50_256,
        pattern=("dense global none",),
    ),
    "tiny": ModelConfig(
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        d_ff=128,
        vocab_size=128,
        max_seq_len=256,
        mask_token_id=127,
        eos_token_id=126,
        pad_token_id=126,
        dtype="float32",
    ),
}  # fmt: skip
