"""What is said about measurements: intervals, and one number for a trade-off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit


def bootstrap(values: npt.ArrayLike, num: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean: of zeros and ones Wilson's, which has a width where all are
    alike; of others that of percentiles, examples drawn with replacement."""
    array, rng = np.asarray(values, float), np.random.default_rng(seed)
    if np.isin(array, (0, 1)).all():
        return _wilson(int(array.sum()), len(array))
    means = [array[rng.integers(len(array), size=len(array))].mean() for _ in range(num)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share of n (Wilson, 1927)."""
    z = float(ndtri(0.975))
    middle = (right + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * math.sqrt(right * (n - right) / n + z**2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_ratio(
    above: npt.ArrayLike, below: npt.ArrayLike, num: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of sum(above) / sum(below), examples drawn with replacement."""
    pairs = np.stack([above, below], axis=1).astype(float)
    return bootstrap_total(pairs, lambda total: total[0] / total[1], num, seed)


def bootstrap_total(
    rows: npt.ArrayLike, value: Callable[[np.ndarray], float], num: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % percentile interval of a value of the sum of rows, drawn with replacement.

    Args:
      rows: [n, c]. What is known of each example, such as counts.
      value: of their sum [c].
      num: samples.
      seed: of what is drawn.
    """
    array, rng = np.asarray(rows), np.random.default_rng(seed)
    draws = (rng.integers(len(array), size=len(array)) for _ in range(num))
    low, high = np.percentile([value(array[drawn].sum(axis=0)) for drawn in draws], [2.5, 97.5])
    return float(low), float(high)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half of its 95 % interval (Student's t); nan of one seed."""
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    t = float(stdtrit(n - 1, 0.975))
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n)


def with_interval(values: Sequence[float], digits: int) -> str:
    """Such as "1.50 ± 0.25": `interval` as text."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def aup(points: Iterable[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism: area under accuracy over tokens per forward, worse ones fading.

    Reference: "d3LLM", arXiv:2601.07568. Points more than 5 below the slowest one are dropped; y is
    weighted by min(exp(-3 (1 - y / best)), 1), and what lies left of the slowest one is not.

    Args:
      points: (tokens per forward, accuracy in per cent) of one family, in any order.
      best: the best accuracy of all families compared, in per cent.
    """
    ordered = sorted(points, key=lambda point: (point[0], -point[1]))
    rho, y = ordered[0]
    area = rho * y
    kept = [(rho_i, y_i) for rho_i, y_i in ordered if y_i >= y - 5]

    def weighted(y: float) -> float:
        return y * min(math.exp(-3 * (1 - y / best)), 1) if best > 0 else 0.0

    for (rho_0, y_0), (rho_1, y_1) in itertools.pairwise(kept):
        area += (rho_1 - rho_0) * (weighted(y_1) + weighted(y_0)) / 2
    return area
