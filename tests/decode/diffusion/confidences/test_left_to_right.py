import numpy as np

from decode.diffusion.components import BlockCausal, BlockQuota, FixedBlocks, LeftToRight
from decode.diffusion.loop import DiffusionMethod
from tests.lib.batches import LENGTHS, run


def test_the_leftmost_come_first_whatever_the_model_says(toy_cfg, toy_params):
    method = DiffusionMethod(
        FixedBlocks(4, aligned=True), BlockCausal(4), LeftToRight(), BlockQuota(4, 2)
    )
    state = run(toy_params, toy_cfg, method)
    steps = np.asarray(state.step_map)
    # Prompts of 3, 1, 6 and 2 tokens; two positions per round, blocks counted from their start.
    assert steps[0, :5].tolist() == [0, 1, 1, 2, 2]
    assert steps[1, :7].tolist() == [0, 0, 1, 2, 2, 3, 3]
    assert steps[2, :6].tolist() == [0, 0, 1, 1, 2, 2]
    for b, length in enumerate(LENGTHS):
        assert (np.diff(steps[b, :length]) >= 0).all()
        assert (np.asarray(state.confidence)[b, :length] <= 1).all()
