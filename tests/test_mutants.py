"""Deliberate breaks can be made: they apply to the tree, and the tests they name are there."""

import subprocess

import pytest

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
