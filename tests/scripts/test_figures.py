"""The documentation's figures come from the numbers on its pages."""

import pytest

from scripts.figures import pages
from tests.lib.mains import run_main
from tests.lib.paths import ROOT

DOCS = ROOT / "docs"


def test_every_figure_is_drawn_by_a_command():
    drawn = {*pages.figures(DOCS), "window_masks"}
    assert {file.stem for file in DOCS.glob("**/*.png")} == drawn


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn."""
    found = []
    monkeypatch.setattr(pages, "plot_speed_quality", lambda *args, **_: found.append(args))
    return found


def test_methods_are_those_of_the_table(drawn, tmp_path):
    pages.methods(DOCS / "methods.md", "many right answers", tmp_path / "a.png", "title")
    (_, panels, title, _), = drawn  # fmt: skip
    assert list(panels) == list(pages.METHODS) and "not drawn" not in title
    quota = next(iter(panels.values()))
    (two,) = (p for p in quota.points if p.method == "quota: 1, 2, 4" and p.quality == 0.212)
    assert two.speed == 19.2 / 9.6 and quota.level == 0.25
    for name, panel in panels.items():  # every curve has a point, every point is on every panel
        assert list(panel.shown) == list(pages.METHODS[name])
        assert len(panel.points) == len(quota.points) == 41


def test_methods_far_below_are_named_instead(drawn, tmp_path):
    pages.methods(DOCS / "methods.md", "SCAN", tmp_path / "a.png", "title")
    (_, panels, title, _), = drawn  # fmt: skip
    assert "not drawn: token_edit, 38 %" in title
    assert "token edits" not in panels["tokens may be taken back"].shown


def test_the_quickstart_is_that_of_the_table(drawn, tmp_path):
    pages.quickstart(DOCS / "quickstart.md", tmp_path / "a.png")
    (_, panels, _), = drawn  # fmt: skip
    one, many = panels.values()
    assert {p.quality for p in one.points} == {1.0} and len(many.points) == 12
    assert many.level == 0.30 and many.points[5].quality == 0.14


def test_the_command_refuses_names_of_no_figure():
    assert "--only has 'nothing'" in run_main("scripts.figures", "--only=nothing", code=1)
