"""Test set-up: no silent rank promotion, toy models."""

from tests.lib import set_up  # isort: skip  (before JAX)

import dataclasses
import functools
from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

from dlm.config import ModelConfig
from dlm.params import Params, init_params

pytest_plugins = ["tests.lib.programs", "tests.lib.tiers"]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # programs here run briefly
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def pytest_unconfigure() -> None:
    set_up.remove_cache()


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """A worker that keeps every module's programs grows to gigabytes."""
    yield
    jax.clear_caches()


# A masked-diffusion model small enough for a plain-Python oracle.
TOY_CFG = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, vocab_size=24,
    max_seq_len=64, mask_token_id=23, eos_token_id=22, pad_token_id=21, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="session")
def toy_cfg() -> ModelConfig:
    return TOY_CFG


def spread(params: Params) -> Params:
    """Makes random weights opinionated: layers that matter, and confidences that differ."""
    layers = dict(params["layers"])
    layers["attention"] = layers["attention"] | {"o": layers["attention"]["o"] * 4.0}
    layers["mlp"] = layers["mlp"] | {"down": layers["mlp"]["down"] * 4.0}
    return params | {"layers": layers, "unembed": params["unembed"] * 6.0}


@pytest.fixture(scope="session")
def toy_params(toy_cfg: ModelConfig) -> Params:
    """Weights of a toy model that is worth decoding; see `spread`."""
    return spread(init_params(jax.random.key(0), toy_cfg))


@pytest.fixture(scope="session")
def toy_dream() -> tuple[ModelConfig, Params]:
    """A toy with the conventions of Dream: shifted logits, biases."""
    return dream_toy()


@pytest.fixture(scope="session", params=["llada", "dream"])
def toy_model(request, toy_cfg: ModelConfig, toy_params: Params) -> tuple[ModelConfig, Params]:
    """Either toy."""
    return (toy_cfg, toy_params) if request.param == "llada" else dream_toy()


@functools.cache
def dream_toy() -> tuple[ModelConfig, Params]:
    cfg = dataclasses.replace(TOY_CFG, qkv_bias=True, shifted_logits=True)
    return cfg, spread(init_params(jax.random.key(5), cfg))
