"""By hand: what is recomputed between refreshes, and whom a shadow sees."""

import jax.numpy as jnp
import numpy as np
import pytest

from decode.diffusion.caches.canvas import Canvas, add_shadow
from decode.diffusion.components import DualCache, PrefixCache, VicinityCache
from dlm.window import Window
from kernels_pallas.window_attention import pack_mask


def canvas_of(num_slots, **fields):
    """Two rows of which nothing is known but `fields`."""
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in fields.items()}
    nobody = jnp.zeros(2, bool)
    return Canvas(
        tokens=jnp.zeros((2, num_slots), jnp.int32), is_active=nobody, block_is_new=nobody,
        undecided=jnp.ones((2, num_slots), bool),
        mix=None, window_start=arrays["block_start"], prompt_len=8, has_shadow=True, **arrays,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cache", "start", "stop", "length"),
    [
        (PrefixCache(), [8, 12], [20, 16], 12),
        (DualCache(), [8, 12], [12, 16], 4),
        (VicinityCache(before=3, after=2), [5, 9], [14, 16], 9),
        (VicinityCache(before=10, after=10), [2, 2], [20, 16], 20),
    ],
)
def test_what_is_recomputed(cache, start, stop, length):
    """Prompts that start at 2 and 0, blocks of 4, and a row that ends with its block."""
    canvas = canvas_of(20, start=[2, 0], end=[20, 16], block_start=[8, 12], block_end=[12, 16])
    span = cache.span(canvas, 4)
    assert (span.start.tolist(), span.stop.tolist(), span.length) == (start, stop, length)


def test_a_shadow_sees_all_but_the_token_at_its_place(toy_cfg):
    """Five positions, the first one padding; the block begins at 2 and has 2 and 1 positions."""
    T, at, ends = 5, 2, (4, 3)
    canvas = canvas_of(T, start=[1, 1], end=[5, 5], block_start=[at, at], block_end=ends)
    window = Window(
        tokens=jnp.arange(2 * T).reshape(2, T),
        positions=jnp.tile(jnp.arange(T) - 1, (2, 1)),
        range=jnp.array([[1, T]] * 2),
    )
    both = add_shadow(window, toy_cfg, canvas, canvas.block_start, 2)
    assert both.tokens[:, T:].tolist() == [[toy_cfg.mask_token_id] * 2] * 2
    assert both.positions[:, T:].tolist() == [[1, 2]] * 2
    expected = np.zeros((2, T + 2, T + 2), bool)
    expected[:, :, 1:T] = True  # what is real
    for b, end in enumerate(ends):
        for i in range(2):
            expected[b, T + i, at + i] = False  # its own place
            expected[b, T + i, T : T + end - at] = True  # other shadows of the block
    np.testing.assert_array_equal(both.mask, pack_mask(jnp.asarray(expected)))
