from decode.diffusion.components import Threshold
from decode.diffusion.round import log_confidence
from tests.lib.rounds import committed, make_round


def test_a_confidence_of_just_the_threshold_passes():
    round = make_round([0.9, 0.89, 0.91, 0.9], eligible=[True, True, True, False])
    round = round.replace(confidence=log_confidence(0.9) + round.confidence * 0)
    assert committed(Threshold(0.9), round) == [[0, 1, 2]]
    assert committed(Threshold(0.91), round) == [[]]


def test_what_is_sure_enough_is_committed_and_nothing_else():
    round = make_round([[0.9, 0.5, 0.7, 0.95], [0.1, 0.2, 0.3, 0.4]])
    assert committed(Threshold(0.65), round) == [[0, 2, 3], []]  # the loop commits the surest one
