"""Fresh parameters."""

import dataclasses

import jax
import numpy as np
import pytest

from dlm.params import init_params
from tests.lib import weights


@pytest.mark.exhaustive(every=4)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_leaf_is_a_normal_draw_of_the_key_folded_with_its_name(toy_cfg, dtype):
    """As the tests draw theirs, without a program per model."""
    cfg = dataclasses.replace(toy_cfg, dtype=dtype, qkv_bias=True)
    ours = init_params(jax.random.key(3), cfg)
    theirs = weights.init_params(jax.random.key(3), cfg)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
    same = lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), atol=1e-7)
    jax.tree.map(same, ours, theirs)
