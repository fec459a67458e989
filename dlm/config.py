"""Model configuration: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import itertools

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


# What a layer may be, in the order in which `ModelConfig.pattern` says it.
LAYER_WORDS = {
    "mlp": ("dense",),  # one gated MLP
    "attention": ("global",),  # as far as the window and its mask allow
    "positions": ("rotary",),  # queries and keys are rotated
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and conventions of one decoder-style transformer. Hashable, so static under `jax.jit`.

    Whether attention is causal or bidirectional is *not* here: the window that is run over says it.

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
      pattern: what the layers are, a kind per layer, over and over: layer i is
        `pattern[i % len(pattern)]`. A kind is three words of `LAYER_WORDS`.
      block_len: positions per block of a model that was trained to see its own block and those
        before it (SDAR, Fast-dLLM v2); None: it was not, or nothing says it was.
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
    pattern: tuple[str, ...] = ("dense global rotary",)
    block_len: int | None = None
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
        if self.block_len is not None and self.block_len < 1:
            raise ValueError(f"block_len={self.block_len} must be at least 1, or None")
        object.__setattr__(self, "pattern", tuple(self.pattern))
        kinds = set(map(" ".join, itertools.product(*LAYER_WORDS.values())))
        if not self.pattern or not kinds.issuperset(self.pattern):
            raise ValueError(
                f"pattern={self.pattern} must be kinds of layers, of which there are "
                f"{', '.join(map(repr, sorted(kinds)))}"
            )
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
