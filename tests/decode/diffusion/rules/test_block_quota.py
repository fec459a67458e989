import pytest

from decode.diffusion.components import BlockQuota
from tests.lib.rounds import committed, make_round

P = [0.5, 0.95, 0.2, 0.99, 0.92, 0.3, 0.1, 0.6]  # surest first: 3, 1, 4, 7, 0, 5, 2, 6


def at_step(step, eligible=None, confidence=P):
    view = make_round(confidence, eligible=eligible)
    return view.replace(block_step=view.block_step + step)


def test_the_schedule_is_of_the_whole_block():
    # 8 positions in 3 steps are 3, 3 and 2.
    for step, expected in ((0, [1, 3, 4]), (1, [1, 3, 4]), (2, [1, 3]), (7, [1, 3])):
        assert committed(BlockQuota(8, 3), at_step(step)) == [expected]
    # A block that begins inside the prompt: not 3 / 3 per step, and never what is decided.
    few = [False, False, False, False, False, True, True, True]
    assert committed(BlockQuota(8, 3), at_step(0, few)) == [[5, 6, 7]]
    assert committed(BlockQuota(8, 4), at_step(0, few)) == [[5, 7]]


def test_what_is_above_the_threshold_counts_if_it_is_more():
    assert committed(BlockQuota(8, 8, 0.9), at_step(0)) == [[1, 3, 4]]
    assert committed(BlockQuota(8, 2, 0.9), at_step(0)) == [[1, 3, 4, 7]]
    assert committed(BlockQuota(8, 8, 0.995), at_step(0)) == [[3]]
    assert committed(BlockQuota(8, 8, 0.0), at_step(0)) == [list(range(8))]
    # Strictly above: at 1 the schedule alone is left.
    certain = [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert committed(BlockQuota(8, 8, 1.0), at_step(0, confidence=certain)) == [[0]]


def test_a_least_number_of_every_step():
    assert committed(BlockQuota(2, 1, 0.995), at_step(5)) == [[1, 3]]
    assert committed(BlockQuota(2, 1, 0.9), at_step(5)) == [[1, 3, 4]]


def test_values_are_needed_for_a_threshold_only():
    assert "values" in BlockQuota(8, 8, 0.9).needs and "values" not in BlockQuota(8, 8).needs


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (BlockQuota(0, 1), "block_len=0 must be at least 1"),
        (BlockQuota(4, 0), "steps=0 must be at least 1"),
        (BlockQuota(4, 4, 1.5), r"threshold=1\.5 must be in \[0, 1\]"),
    ],
)
def test_bad_values_are_refused(toy_cfg, rule, message):
    with pytest.raises(ValueError, match=message):
        rule.validate(toy_cfg)
