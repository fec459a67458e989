from decode.diffusion.components import EntropyThreshold
from tests.lib.rounds import committed, make_round


def test_low_entropies_and_always_the_lowest():
    """Whatever the confidences are."""
    round = make_round(
        [[0.9, 0.1, 0.5, 0.3], [0.9, 0.9, 0.9, 0.1]],
        entropy=[[0.6, 0.5, 0.2, 0.0], [2.0, 0.9, 0.8, 0.7]],
        eligible=[[True, True, True, False], [True, True, True, False]],
    )
    assert committed(EntropyThreshold(0.5), round) == [[1, 2], [2]]
