"""What several modules train from."""

import pathlib

import pytest

from configs import causal_lm
from train import loop


@pytest.fixture(scope="session")
def scan_target(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a small autoregressive model that has seen a few batches of SCAN."""
    folder = tmp_path_factory.mktemp("scan")
    path = loop.run(causal_lm.get_config("scan,runlocal"), folder / "target").model_path
    assert path is not None
    return path


@pytest.fixture(scope="session")
def scan_draft(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a smaller model with the vocabulary of `scan_target`."""
    config = causal_lm.get_config("scan,runlocal")
    config.model.n_layers, config.train.seed = 1, 7
    path = loop.run(config, tmp_path_factory.mktemp("scan") / "draft").model_path
    assert path is not None
    return path
