"""Intervals and areas, by hand."""

import math

import numpy as np
import pytest

from decode.evaluation.statistics import (
    aup,
    bootstrap,
    bootstrap_ratio,
    bootstrap_total,
    interval,
    with_interval,
)


def test_aup_by_hand():
    points = [(4.0, 72.0), (1.0, 80.0), (2.0, 78.0)]  # 72 is more than 5 below 80: dropped
    weight = math.exp(-3 * (1 - 78 / 80))
    expected = 1 * 80 + (2 - 1) * (78 * weight + 80 * 1) / 2
    assert aup(points, best=80) == pytest.approx(expected)
    assert aup([(3.0, 50.0)], best=100) == 150  # left of the slowest point: no weight
    assert aup([(1.0, 0.0), (2.0, 0.0)], best=0) == 0
    # Somebody else's better answers make these worth less.
    assert aup(points, best=100) < expected


def test_bootstrap_interval():
    low, high = bootstrap([0.0, 1.0] * 100)
    sigma = 0.5 / math.sqrt(200)
    assert low == pytest.approx(0.5 - 1.96 * sigma, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * sigma, abs=0.015)
    assert bootstrap([3.0] * 7) == (3.0, 3.0)
    assert bootstrap([0.5, 1.0] * 100) == bootstrap([0.5, 1.0] * 100)  # the same seed
    narrow = bootstrap([0.0, 1.0] * 1000)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)


def test_shares_have_an_interval_where_all_are_alike():
    """Wilson's: of 200 right ones z^2 / (n + z^2) remain; it covers near the ends, too."""
    assert bootstrap([1] * 200) == pytest.approx((1 - 1.96**2 / (200 + 1.96**2), 1), abs=1e-4)
    assert bootstrap([0.0] * 8) == pytest.approx((0, 1.96**2 / (8 + 1.96**2)), abs=1e-4)
    rng, n, share = np.random.default_rng(0), 200, 0.99
    found = [bootstrap(rng.random(n) < share) for _ in range(300)]
    assert np.mean([low <= share <= high for low, high in found]) > 0.92


def test_intervals_of_what_is_made_of_sums():
    rows = np.random.default_rng(0).normal(5, 1, (200, 2))
    low, high = bootstrap_total(rows, lambda total: total[0] ** 2)
    assert low < rows[:, 0].sum() ** 2 < high
    # The mean of a column is one of these, and a ratio.
    mean = bootstrap_total(rows, lambda total: total[0] / len(rows))
    assert mean == pytest.approx(bootstrap(rows[:, 0]))
    ratio = bootstrap_total(rows, lambda total: total[0] / total[1])
    assert ratio == bootstrap_ratio(rows[:, 0], rows[:, 1])


def test_intervals_over_seeds():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-3)
    assert with_interval([1.5], 1) == "1.5"
    assert with_interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"
    assert interval([*range(9)])[1] == pytest.approx(2.306 * math.sqrt(7.5) / 3, rel=1e-4)
