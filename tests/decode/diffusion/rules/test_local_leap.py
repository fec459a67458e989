import itertools

import numpy as np
import pytest

from decode.diffusion.components import LocalLeap, Threshold
from tests.lib.rounds import committed, make_round


def random_round(seed):
    rng = np.random.default_rng(seed)
    return make_round(rng.uniform(0.3, 1, (4, 24)), eligible=rng.random((4, 24)) < 0.7)


def test_example_of_the_card():
    view = make_round([0.95, 0.80, 0.80, 0.70, 0.92, 0.76])
    assert committed(LocalLeap(0.9, 0.75, 1), view) == [[0, 1, 4, 5]]


@pytest.mark.parametrize("rule", [LocalLeap(0.8, 0.8, 4), LocalLeap(0.8, 0.3, 0)])
def test_without_leap_it_is_threshold_decoding(rule):
    for seed in range(5):
        view = random_round(seed)
        assert committed(rule, view) == committed(Threshold(0.8), view)


def test_a_radius_over_the_whole_block_is_a_lower_threshold_once_there_is_an_anchor():
    view = make_round([[0.95, 0.6, 0.5], [0.85, 0.6, 0.5]])
    assert committed(LocalLeap(0.9, 0.55, 99), view) == [[0, 1], []]


def test_committed_and_later_positions_are_no_anchors():
    view = make_round([0.99, 0.8, 0.8], eligible=[False, True, True])
    assert committed(LocalLeap(0.9, 0.7, 2), view) == [[]]


def test_more_radius_or_a_lower_bar_never_commits_less():
    for seed in range(5):
        view = random_round(seed)
        sizes = [committed(LocalLeap(0.9, 0.6, radius), view) for radius in (0, 1, 2, 8)]
        sizes += [committed(LocalLeap(0.9, bar, 8), view) for bar in (0.5, 0.3)]
        for fewer, more in itertools.pairwise(sizes):
            assert all(set(a) <= set(b) for a, b in zip(fewer, more, strict=True))


def test_a_relaxed_bar_above_the_threshold_is_refused(toy_cfg):
    with pytest.raises(ValueError, match=r"relaxed=0\.95 must be in"):
        LocalLeap(0.9, 0.95).validate(toy_cfg)
