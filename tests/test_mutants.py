"""Deliberate breaks can be made: they apply to the tree, and the tests they name are there."""

import subprocess

import pytest

from tests.lib import tiers
from tests.lib.paths import ROOT
from tests.mutants.__main__ import HERE, read

PATCHES = sorted(HERE.glob("*.patch"))


def test_there_are_breaks():
    assert len(PATCHES) >= 40


@pytest.mark.parametrize("file", PATCHES, ids=lambda file: file.stem)
def test_it_can_be_made(file):
    mutant = read(file)
    check = ["git", "apply", "--check", str(file)]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text() or not name, test


def test_breaks_are_noticed_within_days():
    """Whole files have tests that always run."""
    if not {str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py")} <= {
        test.partition("::")[0] for test in tiers.days_between
    }:
        pytest.skip("not all tests were looked for")
    days: dict[str, int] = {}
    for test, every in tiers.days_between.items():
        for name in (test, test.partition("[")[0], test.partition("::")[0]):
            days[name] = min(every, days.get(name, every))
    named = [(file.stem, test) for file in PATCHES for test in read(file).tests]
    assert not [(name, test) for name, test in named if days[test] > tiers.OFTEN]
