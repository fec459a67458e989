"""The exact numbers of published models."""

from __future__ import annotations

from typing import Any

from dlm import rope
from dlm.config import ModelConfig


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


# Published models. LLaDA: arXiv 2502.09992; Dream: arXiv 2508.15487 (the sizes of Qwen2.5-7B);
# Llama 3: arXiv 2407.21783; Qwen2.5: arXiv 2412.15115; Qwen3: arXiv 2505.09388; these three as
# instruction-tuned. SDAR: arXiv 2510.06303; Fast-dLLM v2: arXiv 2509.26328; Stable-DiffCoder: arXiv
# 2601.15892; Tiny-A2D: Qwen3 without its mask.
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
