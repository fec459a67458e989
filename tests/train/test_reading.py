"""Forward passes of training: packed texts that are kept apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.window_attention import pack_mask
from tests.lib import toys
from tests.lib.runs import toy_config
from train import loop
from train.config import ConfigError, from_config_dict
from train.reading import _window, read_completion, read_text

LENGTHS = (5, 1, 4)  # of the texts in a row of ten


@pytest.fixture(scope="module")
def texts():
    """One row of three texts kept apart, the same row as one text, and each text as a row."""
    rng = np.random.default_rng(0)
    completion = rng.integers(0, 4, (1, 10)).astype(np.int32)
    packed = {
        "prompt": np.zeros((1, 0), np.int32),
        "prompt_start": np.zeros(1, np.int32),
        "completion": completion,
        "completion_len": np.array([10], np.int32),
        "segment": np.repeat(np.arange(3, dtype=np.int32), LENGTHS)[None],
    }
    joined = {name: x for name, x in packed.items() if name != "segment"}
    ends = np.cumsum(LENGTHS)
    alone = [
        {
            **joined,
            "completion": completion[:, end - length : end],
            "completion_len": np.array([length], np.int32),
        }
        for length, end in zip(LENGTHS, ends, strict=True)
    ]
    return packed, joined, alone


def test_a_packed_text_is_read_as_it_is_alone(toy_cfg, toy_params, texts):
    packed, joined, alone = texts

    @jax.jit
    def read(batch):
        text = read_text(toy_params, toy_cfg, batch, on_prompt=False)
        return text.hidden[0], text.is_scored[0]

    hidden, counts = read(packed)
    expected, counted = zip(*map(read, alone), strict=True)
    np.testing.assert_allclose(hidden, np.concatenate(expected), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(counts, np.concatenate(counted))
    assert np.flatnonzero(~np.asarray(counts)).tolist() == [0, 5, 6]  # nothing is before these
    seen, counts = read(joined)
    assert np.abs(seen - hidden)[5:].max() > 0.01 and counts.sum() == 9


def test_positions_count_from_the_beginning_of_a_text(texts):
    positions = _window(texts[0], texts[0]["completion"]).positions
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2, 3]]


@pytest.mark.exhaustive(every=4)
def test_a_packed_text_is_unmasked_as_it_is_alone(toy_cfg, toy_params, texts):
    packed, joined, alone = texts
    is_masked = np.arange(10)[None] % 3 == 1
    starts = np.cumsum(LENGTHS) - LENGTHS

    @jax.jit
    def read(batch, is_masked, mask=None):
        return read_completion(toy_params, toy_cfg, batch, is_masked, mask)[0]

    hidden = read(packed, is_masked)
    expected = [
        read(batch, is_masked[:, start : start + batch["completion"].shape[1]])
        for batch, start in zip(alone, starts, strict=True)
    ]
    np.testing.assert_allclose(hidden, np.concatenate(expected), rtol=0, atol=1e-5)
    assert np.abs(read(joined, is_masked) - hidden).max() > 0.01
    # A mask of the objective's own holds beside it.
    causal = jnp.broadcast_to(pack_mask(jnp.tri(10, dtype=bool))[None], (1, 10, 1))
    nothing = np.zeros_like(is_masked)
    text = jax.jit(lambda: read_text(toy_params, toy_cfg, packed, on_prompt=False).hidden[0])()
    np.testing.assert_allclose(read(packed, nothing, causal), text, rtol=0, atol=1e-5)


def test_objectives_that_cannot_keep_texts_apart_are_refused():
    config = toy_config(data__prompt_len=0)
    config.data.packing = config.data.keep_apart = True
    loop._make_recipe(from_config_dict(config), toys.Copy())
    config.train.objective.make = "train.objectives.block_diffusion:BlockDiffusion"
    with pytest.raises(ConfigError, match=r"keep_apart=True must be False with train\.objective="):
        loop._make_recipe(from_config_dict(config), toys.Copy())
