"""Model configuration: one frozen dataclass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dlm import rope

# What a layer may be, in the order in which `ModelConfig.pattern` says it.
LAYER_WORDS = {
    "mlp": ("dense", "experts"),  # one MLP, or several of which a router chooses some per token
    # As far as the window and its mask allow, or of that the positions less than `sliding_window`
    # away.
    "attention": ("global", "sliding"),
    "positions": ("rotary", "none"),  # whether queries and keys are rotated
}
NORMS = ("rms", "rms_offset", "layer")
NORM_PLACES = ("before", "after", "around")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def check_precision(name: str, dtype: str) -> None:
    """Raises ValueError where JAX would make less of a dtype without a word."""
    if dtype == "float64" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{name}='float64' needs the environment variable JAX_ENABLE_X64=1, without which JAX "
            "computes in float32: set it, or say 'float32'"
        )


def shortest_pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, over and over, gives these kinds, one per layer."""
    lengths = range(1, len(kinds) + 1)
    n = next(n for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[:n])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """MLPs of which a router chooses some for every token, and how it does, see `dlm.blocks.moe`.

    Attributes:
      num_experts: E.
      num_chosen: experts per token, in [1, E].
      d_ff: hidden width of one expert.
      scores: what router logits become: "softmax" over all experts, or "sigmoid" of each.
      is_renormalised: whether the weights of the chosen are divided by their sum.
      bias: whether a number per expert is added to its score: "none", only to "choose", or to
        choose and to "weigh".
      num_groups: groups of consecutive experts, of which some are chosen first; divides E.
      num_chosen_groups: how many of them, by the sum of their two highest scores; all: no matter.
      scale: weights are multiplied by it.
      shared_d_ff: hidden width of an MLP that every token goes through besides; 0: there is none.
      has_shared_gate: whether its result is multiplied by a sigmoid of its own.
    """

    num_experts: int
    num_chosen: int
    d_ff: int
    scores: str = "softmax"
    is_renormalised: bool = True
    bias: str = "none"
    num_groups: int = 1
    num_chosen_groups: int = 1
    scale: float = 1.0
    shared_d_ff: int = 0
    has_shared_gate: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_chosen", "d_ff", "num_groups", "num_chosen_groups"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"experts: {name}={getattr(self, name)!r} must be an integer")
        if self.d_ff < 1 or self.shared_d_ff < 0:
            raise ValueError(
                f"experts: d_ff={self.d_ff} must be at least 1 and shared_d_ff="
                f"{self.shared_d_ff} at least 0"
            )
        if not 1 <= self.num_chosen <= self.num_experts:
            raise ValueError(
                f"experts: num_chosen={self.num_chosen} must be in [1, num_experts="
                f"{self.num_experts}]"
            )
        for name, known in (
            ("scores", ("softmax", "sigmoid")),
            ("bias", ("none", "choose", "weigh")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"experts: {name}={value!r} must be one of {known}")
        size = self.num_experts // max(self.num_groups, 1)
        if (
            not 1 <= self.num_chosen_groups <= self.num_groups
            or self.num_experts % self.num_groups
            or self.num_chosen > self.num_chosen_groups * size
            or (self.num_chosen_groups < self.num_groups and size < 2)
        ):
            raise ValueError(
                f"experts: num_chosen_groups={self.num_chosen_groups} of num_groups="
                f"{self.num_groups} must split num_experts={self.num_experts} evenly, two or more "
                f"in a group, and leave num_chosen={self.num_chosen}"
            )


# Fields of `ModelConfig` that say what its layers are made of, beside their sizes.
_OF_LAYERS = (
    *("rotary_dim", "local_rope_theta", "query_growth", "learned_positions", "sliding_window"),
    *("norm", "norm_places", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "joint_qk_norm"),
    *("clip_qkv", "attention_scale", "attention_cap", "activation", "gated", "experts"),
    *("embed_scale", "residual_scale", "logit_scale", "logit_cap", "pattern", "family"),
)


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
      rotary_dim: numbers of a head that are rotated, the first ones; None: all.
      local_rope_theta: base of sliding layers, whose frequencies are not stretched (Gemma 3);
        None: they are as those of the others.
      query_growth: (beta, n): rotated queries at position p are multiplied by
        1 + beta ln(1 + floor(p / n)) (Ministral 3); None: they are not.
      learned_positions: whether a vector per position is added to the embedding (GPT-2).
      sliding_window: W of sliding layers: positions less than W away are seen; None: there are no
        sliding layers.
      norm: "rms", "rms_offset" (times 1 + weight, in float32; Gemma) or "layer" (with a bias).
      norm_places: "before" attention and MLP, "after" them, before what they give is added
        (OLMo 2), or "around" them, both (Gemma 2).
      norm_eps: epsilon inside norms.
      qkv_bias: whether the query, key and value projections have a bias.
      o_bias: whether the projection of what attention gives has one.
      mlp_bias: whether the products of the MLP have one.
      qk_norm: whether queries and keys are normalised per head before rotation (Qwen3).
      joint_qk_norm: whether that is done over all heads at once (OLMoE); only with `qk_norm`.
      clip_qkv: queries, keys and values are clipped to plus and minus this; None: they are not.
      attention_scale: queries times keys are multiplied by it; None: head_dim^(-1/2).
      attention_cap: c of c tanh(z / c), which scores z then go through; None: they do not.
      activation: of the MLP, "silu", "gelu" or "gelu_tanh".
      gated: whether the MLP has a gate.
      experts: of layers that have them; None: none has.
      embed_scale: embeddings are multiplied by it, rounded to `dtype`.
      residual_scale: what attention and MLP give is multiplied by it before it is added.
      logit_scale: final hidden states are multiplied by it.
      logit_cap: c of c tanh(z / c), which logits z go through; None: they do not.
      tie_embeddings: whether the output head is the transposed input embedding.
      shifted_logits: whether the output at position i-1 predicts token i, as in autoregressive
        models and those made from them (Dream). False: position i predicts token i (LLaDA).
      mask_token_id: the MASK token; None for models that have none (plain causal models).
      eos_token_id: ends a completion; of several ends the one that is written.
      more_eos_ids: the others, in ascending order.
      bos_token_id: begins a sequence, where the tokenizer does not add it; None if unused.
      pad_token_id: fills unused positions; never attended to.
      pattern: what the layers are, a kind per layer, over and over: layer i is
        `pattern[i % len(pattern)]`. A kind is three words of `LAYER_WORDS`.
      never_causal: whether the weights were taught to see both sides and nothing else (LLaDA,
        Dream), so that they cannot write from left to right; those of block diffusion
        (`block_len`) can, in blocks of one. Two models that differ in nothing else are equal.
      family: the published architecture in whose files it is written, if those of others could hold
        it as well; None: the first that can.
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
    rope_scaling: rope.Scaling | None = None
    rotary_dim: int | None = None
    local_rope_theta: float | None = None
    query_growth: tuple[float, int] | None = None
    learned_positions: bool = False
    sliding_window: int | None = None
    norm: str = "rms"
    norm_places: str = "before"
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    joint_qk_norm: bool = False
    clip_qkv: float | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    activation: str = "silu"
    gated: bool = True
    experts: Experts | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_cap: float | None = None
    tie_embeddings: bool = False
    shifted_logits: bool = False
    mask_token_id: int | None = None
    eos_token_id: int = 0
    more_eos_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int = 0
    pattern: tuple[str, ...] = ("dense global rotary",)
    never_causal: bool = dataclasses.field(default=False, compare=False)
    family: str | None = None
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
        if not self.norm_eps >= 0:
            raise ValueError(f"norm_eps={self.norm_eps} must be at least 0")
        for name in ("rope_theta", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.block_len is not None and self.block_len < 1:
            raise ValueError(f"block_len={self.block_len} must be at least 1, or None")
        self._read_nested()
        self._check_layers()
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary embeddings)")
        if self.rotary_width % 2 or not 2 <= self.rotary_width <= self.head_dim:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} must be even and in [2, head_dim={self.head_dim}]"
            )
        for name in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value} must be in [0, vocab_size={self.vocab_size})")
        if self.mask_token_id is not None and self.mask_token_id == self.pad_token_id:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} must differ from mask_token_id, "
                "or padding would be decoded"
            )
        object.__setattr__(self, "more_eos_ids", self._more_eos_ids())
        if self.dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"dtype={self.dtype!r} must be 'float32', 'bfloat16', 'float16' or 'float64'"
            )

    def _more_eos_ids(self) -> tuple[int, ...]:
        """Checked and in order."""
        more = sorted(set(self.more_eos_ids) - {self.eos_token_id})
        for token in more:
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"more_eos_ids={token} must be in [0, vocab_size={self.vocab_size})"
                )
        if self.mask_token_id is not None and self.mask_token_id in (self.eos_token_id, *more):
            raise ValueError(
                f"mask_token_id={self.mask_token_id} must not be among the ends of a text "
                f"{(self.eos_token_id, *more)}: it stands for a token to be decided"
            )
        return tuple(more)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end a completion, the written one first."""
        written = () if self.eos_token_id is None else (self.eos_token_id,)
        return (*written, *self.more_eos_ids)

    def _read_nested(self) -> None:
        """Brings what JSON made of tuples and dataclasses back into shape."""
        pattern = tuple(self.pattern)
        for n in range(1, len(pattern)):  # the same said shorter
            if pattern == pattern[:n] * (len(pattern) // n):
                pattern = pattern[:n]
                break
        object.__setattr__(self, "pattern", pattern)
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", rope.from_fields(self.rope_scaling))
        if isinstance(self.experts, Mapping):
            object.__setattr__(self, "experts", Experts(**self.experts))
        if self.query_growth is not None:
            object.__setattr__(self, "query_growth", tuple(self.query_growth))

    def _check_layers(self) -> None:
        known = set(map(" ".join, itertools.product(*LAYER_WORDS.values())))
        if not self.pattern or not known.issuperset(self.pattern):
            raise ValueError(
                f"pattern={self.pattern} must be kinds of layers, of which there are "
                f"{', '.join(map(repr, sorted(known)))}"
            )
        words = {word for kind in self.pattern for word in kind.split()}
        for word, name in (("sliding", "sliding_window"), ("experts", "experts")):
            if word in words and getattr(self, name) is None:
                raise ValueError(f"pattern={self.pattern} has {word} layers: {name} must be given")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1")
        for name, choices in (
            ("norm", NORMS),
            ("norm_places", NORM_PLACES),
            ("activation", ACTIVATIONS),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
        if isinstance(self.rope_scaling, rope.LongRope):
            for name in ("short", "long"):
                if (num := len(getattr(self.rope_scaling, name))) != self.rotary_width // 2:
                    raise ValueError(
                        f"rope_scaling: {name} has {num} numbers and must have "
                        f"{self.rotary_width // 2}, half the rotary width"
                    )
        for name in ("clip_qkv", "attention_scale", "attention_cap", "logit_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.joint_qk_norm and not self.qk_norm:
            raise ValueError("joint_qk_norm=True says how qk_norm=True is done, which is False")

    def kinds(self, axis: str) -> tuple[str, ...]:
        """The word of every layer on an axis of `LAYER_WORDS`."""
        place = list(LAYER_WORDS).index(axis)
        words = [kind.split()[place] for kind in self.pattern]
        return tuple(words[i % len(words)] for i in range(self.n_layers))

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Layers whose parameters have the same shapes, by the kind of their MLP.

        They lie side by side, see `dlm.params.param_specs`.
        """
        kinds = self.kinds("mlp")
        return {
            kind: tuple(i for i, other in enumerate(kinds) if other == kind)
            for kind in LAYER_WORDS["mlp"]
            if kind in kinds
        }

    def plain(self, **changes: Any) -> ModelConfig:
        """A model of plain layers with the sizes, rotary frequencies and tokens of this one.

        Small networks beside a model are made of such layers, whatever the model itself is.
        """
        reset: dict[str, Any] = {
            field.name: field.default
            for field in dataclasses.fields(self)
            if field.name in _OF_LAYERS
        }
        return dataclasses.replace(self, **(reset | changes))

    @property
    def writes_in_place(self) -> bool:
        """Whether from left to right a MASK says the token that belongs where it stands.

        So do block-diffusion models whose outputs are not shifted (SDAR, LLaDA2): in blocks of one
        they are autoregressive. All other models say at a token what follows it.
        """
        return self.block_len is not None and not self.shifted_logits

    @property
    def rotary_width(self) -> int:
        """R, numbers of a head that are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def jnp_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
