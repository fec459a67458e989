"""A pytest plugin: of the tests marked `exhaustive`, a run takes a share.

A test without the mark runs always. Those with it are more of the same, and together take too long
for every change: a run takes one of 128 shares of them, by default that of the day, so that nothing
goes unseen for long. What every component must do, and what its own tests look at, too, is marked
`exhaustive(every=4)`, and so is what takes seconds and alone notices none of the breaks in
tests/mutants: a run takes a quarter of these. `--share=3/16` names a share, `--share=all` takes
every test. A test named by its id (`pytest tests/test_x.py::test_y`) runs, whatever its mark.
"""

import datetime
import zlib

import pytest

NUM_SHARES = 128
OFTEN = 4  # days from one time to the next
days_between: dict[str, int] = {}  # of all tests that were found, by their ids
# Minutes each, and most of them alone: two workers that begin with them end at about one time.
FIRST = ("tests/scripts/", "tests/train/", "tests/decode/")


def share_of(node_id: str, num_shares: int) -> int:
    """The share a test belongs to, in [0, num_shares): the same on every machine."""
    return zlib.crc32(node_id.encode()) % num_shares


def todays_share(today: datetime.date) -> str:
    """`k/N` for a day: the next day has the next share."""
    return f"{today.toordinal() % NUM_SHARES}/{NUM_SHARES}"


def runs(node_id: str, share: str, every: int = NUM_SHARES) -> bool:
    """Whether an exhaustive test is in a share: `all`, or `k/N` with k in [0, N).

    Args:
      node_id: of the test.
      share: which one.
      every: at least so many in a row see the test once.

    Raises:
      ValueError: the share is neither.
    """
    if share == "all":
        return True
    k, slash, n = share.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ValueError(f"--share={share} must be all, or k/N with k in 0 to N - 1")
    num_shares = min(int(n), every)
    return share_of(node_id, num_shares) == int(k) % num_shares


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", metavar="k/N|all", help="which of the exhaustive tests run (default: today's)"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Chooses once: workers are handed the options of the process that starts them."""
    if config.option.share is None:
        named = any("::" in argument for argument in config.args)
        config.option.share = "all" if named else todays_share(datetime.date.today())
    try:
        runs("", config.option.share)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    terminalreporter.write_line(f"of the exhaustive tests: share {config.option.share}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.option.share

    def kept(item: pytest.Item) -> bool:
        marks = item.iter_markers("exhaustive")  # of a case and of its function: the rarer counts
        every = max((mark.kwargs.get("every", NUM_SHARES) for mark in marks), default=1)
        days_between[item.nodeid] = every
        return every == 1 or runs(item.nodeid, share, every)

    left_out = [item for item in items if not kept(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    rank = lambda item: next((i for i, f in enumerate(FIRST) if item.nodeid.startswith(f)), 9)
    items[:] = sorted(filter(kept, items), key=rank)


def more(*cases: object) -> list[object]:
    """Cases of a parametrisation that are more of the same: `[first, *more(second, third)]`.

    A tuple stands for the values of several arguments.
    """
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=pytest.mark.exhaustive) for value in values]


def often(*cases: object) -> list[object]:
    """As `more`; a run takes a quarter of them."""
    return [
        pytest.param(*case.values, marks=pytest.mark.exhaustive(every=OFTEN))
        for case in more(*cases)
    ]
