"""Test set-up, before JAX starts: CPU, eight fake devices, no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)

import jax
import pytest
from hypothesis import settings

from dlm.config import ModelConfig
from dlm.params import Params, init_params

jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="session")
def toy_cfg() -> ModelConfig:
    """A masked-diffusion model small enough for a plain-Python oracle."""
    return ModelConfig(
        d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, vocab_size=24,
        max_seq_len=64, mask_token_id=23, eos_token_id=22, pad_token_id=21, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="session")
def toy_params(toy_cfg: ModelConfig) -> Params:
    """Random weights with spread logits, so that confidences differ and thresholds matter."""
    params = init_params(jax.random.key(0), toy_cfg)
    params["unembed"] = params["unembed"] * 6.0
    return params
