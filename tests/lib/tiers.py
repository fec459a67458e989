"""A pytest plugin: of the tests marked `exhaustive`, a run takes a share.

A test without the mark runs always. Those with it are more of the same, and together take too long
for every change: a run takes one of 64 shares of them, by default that of the day, so that
nothing goes unseen for long. `--share=3/16` names a share, `--share=all` takes every test. A test
named by its id (`pytest tests/test_x.py::test_y`) runs, whatever its mark.
"""

import datetime
import zlib

import pytest

NUM_SHARES = 64
# Minutes each, and most of them alone: two workers that begin with them end at about one time.
FIRST = ("tests/scripts/", "tests/train/", "tests/decode/")


def share_of(node_id: str, num_shares: int) -> int:
    """The share a test belongs to, in [0, num_shares): the same on every machine."""
    return zlib.crc32(node_id.encode()) % num_shares


def todays_share(today: datetime.date) -> str:
    """`k/N` for a day: the next day has the next share."""
    return f"{today.toordinal() % NUM_SHARES}/{NUM_SHARES}"


def runs(node_id: str, share: str) -> bool:
    """Whether an exhaustive test is in a share: `all`, or `k/N` with k in [0, N).

    Raises:
      ValueError: the share is neither.
    """
    if share == "all":
        return True
    k, slash, n = share.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise ValueError(f"--share={share} must be all, or k/N with k in 0 to N - 1")
    return share_of(node_id, int(n)) == int(k)


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
    kept = lambda item: not item.get_closest_marker("exhaustive") or runs(item.nodeid, share)
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
