"""The filter by hand, and that it goes with its own model only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlm
from dlm.heads.learn2pd import init_filter, load_filter, save_filter
from dlm.lm import LanguageModel


@pytest.fixture
def lm(toy_cfg, toy_params):
    return LanguageModel(toy_params, toy_cfg)


def test_logits_by_hand():
    filter = init_filter(jax.random.key(0), 3).replace(
        w1=jnp.eye(3), b1=jnp.array([-0.5, -0.5, 0.0]), w2=2 * jnp.ones((3, 3)), b2=jnp.arange(3.0)
    )
    # relu(0.4 - 0.5, 0.9 - 0.5, 0.2) = (0, 0.4, 0.2), twice their sum is 1.2.
    np.testing.assert_allclose(
        filter.logits(jnp.array([0.4, 0.9, 0.2])), [1.2, 2.2, 3.2], rtol=1e-6
    )


def test_weights_are_input_first():
    filter = init_filter(jax.random.key(1), 5)
    c = np.random.default_rng(0).random((7, 5))
    w1, b1, w2, b2 = (np.asarray(x, np.float64) for x in jax.tree.leaves(filter))
    expected = np.stack([w2.T @ np.maximum(w1.T @ row + b1, 0) + b2 for row in c])
    np.testing.assert_allclose(filter.logits(jnp.asarray(c)), expected, rtol=1e-5)


@pytest.mark.parametrize(("block_len", "num"), [(32, 2112), (8, 144)])
def test_number_of_parameters(block_len, num):
    """Card, check 4: 2 B^2 + 2 B."""
    filter = init_filter(jax.random.key(0), block_len)
    assert sum(leaf.size for leaf in jax.tree.leaves(filter)) == num
    assert filter.block_len == block_len


def test_what_is_saved_is_what_is_loaded(tmp_path, lm):
    filter = init_filter(jax.random.key(2), 4, dlm.fingerprint(lm))
    save_filter(tmp_path / "filter", filter)
    loaded = load_filter(tmp_path / "filter", lm)
    assert jax.tree.structure(loaded) == jax.tree.structure(filter)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(filter), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_model_and_broken_files_are_refused(tmp_path, lm):
    save_filter(tmp_path, init_filter(jax.random.key(2), 4, dlm.fingerprint(lm)))
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 1.1, lm.params))
    with pytest.raises(ValueError, match=r"belongs to model .* train a filter for it"):
        load_filter(tmp_path, other)
    load_filter(tmp_path, None)
    text = (tmp_path / "filter.json").read_text()
    (tmp_path / "filter.json").write_text(text.replace('"block_len": 4', '"block_len": 8'))
    with pytest.raises(ValueError, match=r"w1 of shape \(4, 4\) must be \(8, 8\)"):
        load_filter(tmp_path, lm)
    with pytest.raises(ValueError, match="block_len=0"):
        init_filter(jax.random.key(0), 0)


def test_a_fingerprint_is_of_the_model_not_of_its_dtype_or_place(lm):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
    cfg = dataclasses.replace(lm.cfg, dtype="bfloat16")
    assert dlm.fingerprint(LanguageModel(half, cfg)) == dlm.fingerprint(lm)
    shorter = dataclasses.replace(lm.cfg, max_seq_len=32)
    assert dlm.fingerprint(LanguageModel(lm.params, shorter)) != dlm.fingerprint(lm)
