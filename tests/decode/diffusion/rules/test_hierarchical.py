import numpy as np
import pytest

from decode.diffusion.components import Hierarchical
from tests.lib.rounds import committed, make_round


def test_best_of_every_run_above_the_low_bar():
    confidence = [0.5, 0.6, 0.7, 0.45, 0.3, 0.2, 0.95, 0.93]
    eligible = [True, True, False, True, True, False, True, True]
    view = make_round(confidence, eligible=eligible)
    # Runs 0-1, 3-4 and 6-7: their best are 1, 3 and 6; 7 passes the threshold by itself.
    assert committed(Hierarchical(0.9, 0.4), view) == [[1, 3, 6, 7]]
    assert committed(Hierarchical(0.9, 0.5), view) == [[1, 6, 7]]
    assert committed(Hierarchical(0.9, 0.9), view) == [[6, 7]]


def test_comparisons_are_strict():
    view = make_round([0.5, 0.25, 0.5])
    assert committed(Hierarchical(0.75, 0.5), view) == [[]]
    assert committed(Hierarchical(0.75, 0.25), view) == [[0, 2]]  # equally sure: both are best


def test_a_full_block_is_halved():
    """With one run only its best is committed, which splits it into two."""
    confidence = np.array([0.5, 0.52, 0.54, 0.6, 0.53, 0.51, 0.5])
    view = make_round(confidence)
    assert committed(Hierarchical(0.9, 0.4), view) == [[3]]
    view = make_round(confidence, eligible=np.arange(7) != 3)
    assert committed(Hierarchical(0.9, 0.4), view) == [[2, 4]]


def test_a_low_bar_above_the_threshold_is_refused(toy_cfg):
    with pytest.raises(ValueError, match=r"low_threshold=0\.8 must be in"):
        Hierarchical(0.7, 0.8).validate(toy_cfg)
