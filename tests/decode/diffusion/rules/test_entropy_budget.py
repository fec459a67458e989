import numpy as np
import pytest

from decode.diffusion.components import EntropyBudget
from tests.lib.rounds import committed, make_round


def budget(gamma, entropy, eligible=None, counts_last=False):
    view = make_round(np.full(len(entropy), 0.5), entropy=entropy, eligible=eligible)
    return committed(EntropyBudget(gamma, counts_last), view)[0]


def test_sum_without_the_last_stays_within_the_budget():
    entropy = [0.30, 0.01, 0.05, 0.02]
    assert budget(0.0, entropy) == [1]
    assert budget(0.01, entropy) == [1, 3]
    assert budget(0.031, entropy) == [1, 2, 3]
    assert budget(0.081, entropy) == [0, 1, 2, 3]


def test_the_sum_with_the_last_stays_below_the_budget():
    entropy = [0.30, 0.01, 0.05, 0.02]
    for gamma, expected in ((0.0, [1]), (0.03, [1]), (0.031, [1, 3]), (0.381, [0, 1, 2, 3])):
        assert budget(gamma, entropy, counts_last=True) == expected
    assert budget(0.1, [0.0, 0.02, 0.3], eligible=[False, True, True], counts_last=True) == [1]
    assert budget(0.0, [0.2, 0.2], counts_last=True) == [0]  # equal ones: the left one


def test_certain_positions_cost_nothing():
    assert budget(0.0, [0.0, 0.4, 0.0, 0.0]) == [0, 1, 2, 3]  # all before the last are free
    assert budget(0.0, [0.0, 0.4, 0.0, 0.5]) == [0, 1, 2]


def test_decided_positions_neither_cost_nor_count():
    assert budget(0.01, [0.0, 0.02, 0.03], eligible=[False, True, True]) == [1]


def test_a_negative_budget_is_refused(toy_cfg):
    with pytest.raises(ValueError, match="budget=-1 must be at least 0 nats"):
        EntropyBudget(-1.0).validate(toy_cfg)
