"""Model configuration: one frozen dataclass, and the exact numbers of published models."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequencies stretched for longer texts, as Llama 3.1 does ("llama3").

    Reference: Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, and the public
    code. Wavelengths up to original / high_freq_factor stay, those from original / low_freq_factor
    are stretched by `factor`, those in between by a share of it.

    Attributes:
      factor: > 0.
      low_freq_factor: > 0.
      high_freq_factor: > low_freq_factor.
      original_max_seq_len: positions of the model before it was stretched.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int

    def __post_init__(self) -> None:
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                f"rope_scaling: factor={self.factor} must be positive, and low_freq_factor="
                f"{self.low_freq_factor} positive and below high_freq_factor="
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and conventions of one decoder-style transformer. Hashable, so static under `jax.jit`.

    Whether attention is causal or bidirectional is *not* here: it is an argument of `forward`.

    Attributes:
      d_model: D, width of the residual stream.
      n_layers: L.
      n_heads: N, query heads.
      n_kv_heads: K, key/value heads; divides `n_heads`.
      head_dim: H, width of one head; even, because rotary embeddings rotate halves.
      d_ff: F, hidden width of the gated MLP.
      vocab_size: V, rows of the embedding (published models pad it beyond the tokenizer).
      max_seq_len: longest prompt + completion, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are stretched; None: they are not.
      norm_eps: epsilon inside RMSNorm.
      qkv_bias: whether the query, key and value projections have a bias.
      qk_norm: whether queries and keys are RMS-normalised per head before rotation (Qwen3).
      tie_embeddings: whether the output head is the transposed input embedding.
      shifted_logits: whether the output at position i-1 predicts token i, as in autoregressive
        models and those made from them (Dream). False: position i predicts token i (LLaDA).
      mask_token_id: the MASK token; None for models that have none (plain causal models).
      eos_token_id: ends a completion.
      bos_token_id: begins a sequence, where the tokenizer does not add it; None if unused.
      pad_token_id: fills unused positions; never attended to.
      dtype: of parameters and matrix products; norms, softmax and statistics are float32.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    shifted_logits: bool = False
    mask_token_id: int | None = None
    eos_token_id: int = 0
    bos_token_id: int | None = None
    pad_token_id: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        sizes = (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "vocab_size",
            "max_seq_len",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary embeddings)")
        for name in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value} must be in [0, vocab_size={self.vocab_size})")
        if self.mask_token_id is not None and self.mask_token_id == self.pad_token_id:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} must differ from mask_token_id, "
                "or padding would be decoded"
            )
        if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"dtype={self.dtype!r} must be 'float32', 'bfloat16', 'float16' or 'float64'"
            )

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def _llama3(**sizes: Any) -> ModelConfig:
    factor = sizes.pop("factor")
    scaling = RopeScaling(
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
        bos_token_id=128_000,
        pad_token_id=128_009,
    )


def _qwen(**sizes: Any) -> ModelConfig:
    return ModelConfig(
        **sizes,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        shifted_logits=True,
        eos_token_id=151_645,
        pad_token_id=151_643,
    )


# Published models. LLaDA: arXiv 2502.09992; Dream: arXiv 2508.15487 (the sizes of Qwen2.5-7B);
# Llama 3: arXiv 2407.21783; Qwen2.5: arXiv 2412.15115; Qwen3: arXiv 2505.09388. The latter three as
# instruction-tuned.
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
