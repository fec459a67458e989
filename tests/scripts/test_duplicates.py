"""The same code is found whatever it is called, and nothing else is."""

from scripts.duplicates.find import duplicates
from tests.lib.paths import ROOT

LENGTH = 12

ONE = '''"""What it does."""
import math

def area(radius, scale):
    """Of a circle."""
    square = radius * radius

    found = math.pi * square  # exactly
    return found * scale
'''
OTHER = """import math

class Disc:
    def size(self, r, by):
        sq = r * r
        out = math.pi * sq
        return out * by
"""


def test_names_comments_and_indentation_do_not_matter():
    ((one, other),) = duplicates({"one": ONE, "other": OTHER}, 3)
    assert one == ("one", 6, 9) and other == ("other", 5, 7)
    assert not list(duplicates({"one": ONE, "other": OTHER}, 4))


def test_names_must_differ_in_the_same_way():
    assert not list(duplicates({"one": ONE, "other": OTHER.replace("out * by", "sq * by")}, 3))
    assert not list(duplicates({"one": ONE, "other": OTHER.replace("math.pi", "math.e")}, 3))


def test_a_run_is_reported_once_and_as_long_as_it_is():
    lines = "".join(f"x{i} = f({i})\n" for i in range(6))
    assert list(duplicates({"a": lines, "b": "y = 7\n" + lines}, 3)) == [(("a", 1, 6), ("b", 2, 7))]
    assert not list(duplicates({"a": "x = f(1)\n" * 5}, 3))  # it would overlap itself


def test_no_run_of_a_dozen_lines_stands_twice():
    files = {
        str(file.relative_to(ROOT)): file.read_text()
        for package in ("configs", "dlm", "kernels_pallas", "scripts", "train")
        for file in sorted((ROOT / package).rglob("*.py"))
    }
    assert not list(duplicates(files, LENGTH))
