"""Small random models that are worth decoding."""

import dataclasses
import functools

import jax

from dlm.config import ModelConfig
from dlm.params import Params, init_params

# A masked-diffusion model small enough for a plain-Python oracle.
TOY_CFG = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, vocab_size=24,
    max_seq_len=64, mask_token_id=23, eos_token_id=22, pad_token_id=21, dtype="float32",
)  # fmt: skip


def spread(params: Params) -> Params:
    """Makes random weights opinionated: layers that matter, and confidences that differ."""
    layers = dict(params["layers"])
    layers["attention"] = layers["attention"] | {"o": layers["attention"]["o"] * 4.0}
    layers["mlp"] = layers["mlp"] | {"down": layers["mlp"]["down"] * 4.0}
    return params | {"layers": layers, "unembed": params["unembed"] * 6.0}


def random_model(seed: int, cfg: ModelConfig) -> Params:
    """Random weights, spread, as one program."""
    return jax.jit(lambda key: spread(init_params(key, cfg)))(jax.random.key(seed))


@functools.cache
def dream_toy() -> tuple[ModelConfig, Params]:
    """A toy with the conventions of Dream: shifted logits, biases."""
    cfg = dataclasses.replace(TOY_CFG, qkv_bias=True, shifted_logits=True)
    return cfg, random_model(5, cfg)
