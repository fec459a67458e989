import itertools
import json

import numpy as np
import pytest

from decode.diffusion.components import Factor, Frechet
from tests.lib.paths import GOLDEN
from tests.lib.rounds import committed, make_round

ROWS = json.loads((GOLDEN / "rules" / "frechet.json").read_text())["rows"]
RANDOM = np.random.default_rng(0).uniform(0.3, 1.0, (20, 12)) ** 0.2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['seed']}-{row['margin']}")
def test_commits_are_those_of_the_public_function(row):
    given = make_round(row["confidence"], eligible=row["eligible"])
    expected = [np.flatnonzero(commit).tolist() for commit in row["commit"]]
    surest = [[int(c)] for c in np.where(row["eligible"], row["confidence"], -1).argmax(axis=-1)]
    found = committed(Frechet(row["margin"]), given)
    found = [f or s for f, s in zip(found, surest, strict=True)]  # the loop's guarantee
    assert found == expected


def test_equal_confidences_are_those_of_the_factor_rule():
    for confidence in (0.8, 0.95, 0.99):
        given = make_round(np.full((1, 12), confidence))
        assert committed(Frechet(0.25), given) == committed(Factor(0.75), given)


def test_it_contains_the_factor_rule_and_falls_with_the_margin():
    given = make_round(RANDOM)
    by_margin = [committed(Frechet(m), given) for m in (0.0, 0.1, 0.25, 0.5, 1.0)]
    for more, less in itertools.pairwise(by_margin):
        assert all(set(b) <= set(a) for a, b in zip(more, less, strict=True))
    assert not any(by_margin[-1])  # one per step, by the loop
    factor = committed(Factor(0.75), given)
    assert all(set(f) <= set(c) or len(f) == 1 for f, c in zip(factor, by_margin[2], strict=True))
    assert by_margin[2] != factor


def test_bad_margins_are_refused(toy_cfg):
    with pytest.raises(ValueError, match=r"margin=-0.1 must be at least 0"):
        Frechet(-0.1).validate(toy_cfg)
