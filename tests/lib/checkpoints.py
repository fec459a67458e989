"""Parameters to be written and read again."""

import json

import jax
import numpy as np

import dlm
from dlm import rope
from dlm.params import abstract_params
from dlm.presets import PRESETS

NAMES = ("llada_small", "dream_small")

TINY = PRESETS["tiny"]

SCALING = rope.Llama3(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192
)


def assert_same(a, b):
    """The same tree, to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def random_params(cfg):
    """Numbers for every weight of a model, in NumPy."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), abstract_params(cfg))


def load_with_mask(path, directory):
    """A checkpoint whose config.json names no MASK or no end, 93 and 90; through `directory`."""
    raw = {"mask_token_id": 93, "eos_token_id": 90} | json.loads((path / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "model.safetensors").symlink_to(path / "model.safetensors")
    return dlm.load(directory)
