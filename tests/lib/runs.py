"""Runs of the trainer on a toy task."""

import jax
import numpy as np

from tests.lib import toys
from train.metrics import read_metrics


def toy_config(**changes):
    """The toys' config, `model__d_model=32` and the like changed."""
    config = toys.get_config()
    for name, value in changes.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def without_times(workdir):
    """The lines of a run's metrics."""
    return [
        {name: value for name, value in line.items() if name != "tokens_per_s"}
        for line in read_metrics(workdir)
    ]


def assert_same(ours, theirs):
    """Two trees are equal to the bit."""
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
