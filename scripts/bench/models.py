"""Whose shapes are timed."""

from __future__ import annotations

import dataclasses

import jax

import dlm
from dlm.config import ModelConfig
from dlm.params import Params, apart, init_params, is_faster_apart
from dlm.presets import PRESETS

# About 20 M parameters: large enough that matrix products and not dispatch decide on a CPU.
BENCH = ModelConfig(
    d_model=384, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=64, d_ff=1024, vocab_size=16384,
    max_seq_len=1024, mask_token_id=16383, eos_token_id=16382, pad_token_id=16382, dtype="float32",
)  # fmt: skip
# Of the separate draft model: Llama's own small sibling, or two layers of the model's width.
DRAFTS = {"llama3_1_8b": PRESETS["llama3_2_1b"]}


def model(preset: str, dtype: str) -> ModelConfig:
    """`BENCH` or a preset, maybe in another dtype (empty: its own)."""
    cfg = BENCH if preset == "bench" else PRESETS[preset]
    return dataclasses.replace(cfg, dtype=dtype) if dtype else cfg


def draft_of(preset: str, cfg: ModelConfig) -> ModelConfig:
    """The separate draft model of a target."""
    return DRAFTS.get(preset, dataclasses.replace(cfg, n_layers=2))


def random_params(cfg: ModelConfig) -> Params:
    """Random weights, laid out as `dlm.load` would."""
    params = init_params(jax.random.key(0), cfg)
    return jax.block_until_ready(apart(params, cfg) if is_faster_apart(cfg) else params)


def load(checkpoint: str, cfg: ModelConfig, dtype: str) -> dlm.LanguageModel:
    """A trained model (see `dlm.load`), or `cfg` with random weights."""
    if not checkpoint:
        return dlm.LanguageModel(random_params(cfg), cfg)
    return dlm.load(checkpoint, dtype=dtype or None)
