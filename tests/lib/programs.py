"""A pytest plugin that counts the programs each test compiles, and what they cost.

Programs are what makes this suite slow: a test that decodes once through a loop of its own waits
seconds for a compiler, and microseconds for the result. So every run ends with the tests that
compiled most, and a module that asks for more programs than its budget fails. Seconds depend on
the machine and are only printed.

A program counts when it is asked for, whether XLA then compiles it or the compilation cache has it:
the number does not depend on what ran before. Programs of `exhaustive` tests count towards no
budget, as not every run has them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax.monitoring
import pytest

WORST = 30  # tests printed
MOST_KEPT = 2000  # programs a worker keeps; thousands of them are gigabytes
MOST_MAPS = 40_000  # parts of memory they are in; at 65,530 Linux gives a process no more
MAPS = Path("/proc/self/maps")  # Linux only
BUDGETS = Path(__file__).with_name("programs.json")
DEFAULT_BUDGET = "default"

_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"
_DURATIONS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "compile_s",
}
_PROPERTY = "programs"  # of a test's report, by which workers tell the controller


@dataclasses.dataclass
class Programs:
    """What was compiled.

    Attributes:
      num: programs asked for.
      hits: of these, how many the compilation cache had.
      trace_s: seconds in Python, making jaxprs (those inside others count twice).
      lower_s: seconds from jaxpr to MLIR.
      compile_s: seconds in XLA, or reading its cache.
    """

    num: int = 0
    hits: int = 0
    trace_s: float = 0.0
    lower_s: float = 0.0
    compile_s: float = 0.0

    def add(self, other: Programs) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


_now = Programs()  # of the test that runs
_num_kept = 0


def _count(event: str, **_: object) -> None:
    global _num_kept
    if event == _REQUEST:
        _now.num += 1
        _num_kept += 1
    elif event == _HIT:
        _now.hits += 1


def _measure(event: str, seconds: float, **_: object) -> None:
    if name := _DURATIONS.get(event):
        setattr(_now, name, getattr(_now, name) + seconds)


jax.monitoring.register_event_listener(_count)
jax.monitoring.register_event_duration_secs_listener(_measure)


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Behind a module: what modules share stays, until there is too much of it."""
    global _num_kept
    yield
    if _num_kept > MOST_KEPT or _num_maps() > MOST_MAPS:
        jax.clear_caches()
        _num_kept = 0


def _num_maps() -> int:
    return MAPS.read_bytes().count(b"\n") if MAPS.exists() else 0


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _now
    _now = Programs()
    yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    global _now
    outcome = yield
    report = outcome.get_result()
    report.programs = dataclasses.asdict(_now)  # the reports of workers travel with all they hold
    _now = Programs()


class Report:
    """Gathers what tests compiled, prints it, and fails modules over their budget."""

    def __init__(self, budgets: dict[str, int]) -> None:
        self.budgets = budgets
        self.tests: dict[str, Programs] = collections.defaultdict(Programs)
        self.exhaustive: set[str] = set()  # of them
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = getattr(report, _PROPERTY, None)
        if found is not None:
            self.tests[report.nodeid].add(Programs(**found))
            self.seconds[report.nodeid] += report.duration
            if "exhaustive" in report.keywords:
                self.exhaustive.add(report.nodeid)

    def modules(self) -> dict[str, Programs]:
        """By path of the test module; without its exhaustive tests."""
        modules: dict[str, Programs] = collections.defaultdict(Programs)
        for test, programs in self.tests.items():
            if test not in self.exhaustive:
                modules[test.split("::")[0]].add(programs)
        return modules

    def over_budget(self) -> list[str]:
        """A sentence for each module that asked for too many programs."""
        found = []
        for module, programs in sorted(self.modules().items()):
            budget = self.budgets.get(module, self.budgets[DEFAULT_BUDGET])
            if programs.num > budget:
                found.append(
                    f"{module} asked for {programs.num} programs, its budget is {budget}: share a "
                    f"compiled model among its tests, or say in {BUDGETS.name} why it needs more"
                )
        return found

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over_budget() and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        out = terminalreporter
        total = Programs()
        for programs in self.tests.values():
            total.add(programs)
        if not total.num:
            return
        out.section(f"programs: {total.num} asked for, {total.hits} from the cache")
        out.write_line(
            f"{sum(self.seconds.values()):.0f} s in tests; tracing {total.trace_s:.0f} s, "
            f"lowering {total.lower_s:.0f} s, compiling {total.compile_s:.0f} s"
        )
        cost = lambda p: p.lower_s + p.compile_s
        worst = sorted(self.tests.items(), key=lambda item: -cost(item[1]))[:WORST]
        for test, programs in worst:
            out.write_line(
                f"{cost(programs):6.1f} s {programs.num:4d} programs {self.seconds[test]:6.1f} s "
                f"in all  {test}"
            )
        for sentence in self.over_budget():
            out.write_line(sentence, red=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # not on a worker
        config.pluginmanager.register(Report(json.loads(BUDGETS.read_text())), "programs_report")
