"""Test set-up: no silent rank promotion, toy models."""

from tests.lib import set_up  # isort: skip  (before JAX)

import signal

import jax
import pytest
from hypothesis import settings

from dlm.config import ModelConfig
from dlm.params import Params
from tests.lib.models import TOY_CFG, dream_toy, random_model

pytest_plugins = ["tests.lib.programs", "tests.lib.tiers"]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # programs here run briefly
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
# Shells start what runs in the background with Ctrl-C ignored, and subprocesses inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    set_up.remove_cache()


@pytest.fixture(scope="session")
def toy_cfg() -> ModelConfig:
    return TOY_CFG


@pytest.fixture(scope="session")
def toy_params(toy_cfg: ModelConfig) -> Params:
    """Weights of a toy model that is worth decoding; see `spread`."""
    return random_model(0, toy_cfg)


@pytest.fixture(scope="session")
def toy_dream() -> tuple[ModelConfig, Params]:
    """A toy with the conventions of Dream: shifted logits, biases."""
    return dream_toy()


@pytest.fixture(
    scope="session", params=["dream", pytest.param("llada", marks=pytest.mark.exhaustive)]
)
def toy_model(request, toy_cfg: ModelConfig, toy_params: Params) -> tuple[ModelConfig, Params]:
    """Either toy: by default the one with more to get wrong."""
    return (toy_cfg, toy_params) if request.param == "llada" else dream_toy()
