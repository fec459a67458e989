"""What the test suite does with itself: shares of the exhaustive tests, budgets of programs."""

import datetime
import json
import types

import jax
import jax.numpy as jnp
import pytest

from tests.lib import programs, tiers

IDS = [f"tests/test_{a}.py::test_{b}[{c}]" for a in "abcd" for b in "abcd" for c in range(20)]


def test_every_test_is_in_one_share_and_shares_are_about_equal():
    shares = [f"{k}/16" for k in range(16)]
    chosen = [[i for i in IDS if tiers.runs(i, share)] for share in shares]
    assert sorted(i for c in chosen for i in c) == sorted(IDS)
    assert all(5 <= len(c) <= 45 for c in chosen)
    assert all(tiers.runs(i, "all") for i in IDS)


def test_every_fourth_day_sees_what_runs_often():
    for first in (0, 9, 124):
        days = [f"{k}/{tiers.NUM_SHARES}" for k in range(first, first + tiers.OFTEN)]
        chosen = [[i for i in IDS if tiers.runs(i, day, tiers.OFTEN)] for day in days]
        assert sorted(i for c in chosen for i in c) == sorted(IDS)
    assert sum(tiers.runs(i, "1/2", tiers.OFTEN) for i in IDS) > len(IDS) // 3


def test_as_many_days_as_there_are_shares_see_them_all():
    first = datetime.date(2024, 2, 20)
    days = [first + datetime.timedelta(days=i) for i in range(tiers.NUM_SHARES)]
    shares = {f"{k}/{tiers.NUM_SHARES}" for k in range(tiers.NUM_SHARES)}
    assert {tiers.todays_share(day) for day in days} == shares


@pytest.mark.parametrize("share", ["some", "16/16", "-1/16", "1", "1/", "/16"])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValueError, match="must be all, or k/N"):
        tiers.runs("tests/test_a.py::test_b", share)


def test_only_exhaustive_tests_are_left_out():
    item = lambda name, marks: types.SimpleNamespace(
        nodeid=name, iter_markers=lambda mark: marks if mark == "exhaustive" else []
    )
    rare, often = pytest.mark.exhaustive.mark, pytest.mark.exhaustive(every=4).mark
    marks = [[], [rare, often], [], [often]]
    items = [item(i, marks[n % 4]) for n, i in enumerate(IDS)]
    dropped = []
    config = types.SimpleNamespace(
        option=types.SimpleNamespace(share="3/16"),
        hook=types.SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items)),
    )
    tiers.pytest_collection_modifyitems(config, items)
    kept = {i.nodeid for i in items}
    every = [0, tiers.NUM_SHARES, 0, 4]
    assert kept == {
        i for n, i in enumerate(IDS) if n % 2 == 0 or tiers.runs(i, "3/16", every[n % 4])
    }
    assert kept | {i.nodeid for i in dropped} == set(IDS) and len(items) + len(dropped) == len(IDS)


def test_programs_are_counted():
    before = programs._now.num
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert programs._now.num > before
    again = jax.jit(lambda x: x * 3 - 1)
    again(jnp.ones(7))
    before = programs._now.num
    again(jnp.ones(7))  # compiled, and ones of this shape too
    assert programs._now.num == before


def report_of(test, num, keywords=()):
    return types.SimpleNamespace(
        nodeid=test, duration=1.0, keywords=keywords, programs={"num": num}
    )


def test_modules_over_their_budget_fail_the_run():
    report = programs.Report({"default": 10, "tests/test_b.py": 25})
    for test, num in [("a.py::x", 5), ("a.py::y[1]", 5), ("b.py::x", 20), ("b.py::y", 5)]:
        report.pytest_runtest_logreport(report_of(f"tests/test_{test}", num))
    more = report_of("tests/test_b.py::z", 100, keywords=["exhaustive"])
    report.pytest_runtest_logreport(more)
    assert report.over_budget() == []
    session = types.SimpleNamespace(exitstatus=0)
    report.pytest_sessionfinish(session)
    assert session.exitstatus == 0

    report.pytest_runtest_logreport(report_of("tests/test_a.py::x", 1))  # its teardown, say
    [sentence] = report.over_budget()
    assert sentence.startswith("tests/test_a.py asked for 11 programs, its budget is 10")
    report.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED


def test_every_budget_is_of_a_module_that_exists(request):
    for module in json.loads(programs.BUDGETS.read_text()).keys() - {programs.DEFAULT_BUDGET}:
        assert (request.config.rootpath / module).is_file(), module
