"""A ragged batch, decoded."""

import numpy as np

from decode.diffusion.loop import decode, init_state

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [2, 2]]
LENGTHS = [12, 10, 12, 5]  # 10 and 5 end inside a block


def run(params, cfg, method, prompts=PROMPTS, gen_len=LENGTHS, **options):
    """The finished state."""
    return decode(params, cfg, method, init_state(cfg, method, prompts, gen_len=gen_len, **options))


def assert_same(a, b):
    for field in ("tokens", "step_map", "num_forwards"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)
