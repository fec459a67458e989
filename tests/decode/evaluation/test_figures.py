"""Figures are written; what is in colour, and that names do not lie on each other."""

import itertools

from matplotlib.figure import Figure
from matplotlib.text import Text

from decode.evaluation.figures import (
    OperatingPoint,
    Panel,
    front,
    plot_speed_quality,
    write_names,
)


def point(method, speed, quality, setting=""):
    return OperatingPoint(method, setting, speed, quality)


def test_a_figure_of_two_panels(tmp_path):
    points = [point("quota", 1.0, 0.9, "none"), point("quota", 2.0, 0.8, "dual")]
    panels = {"one": Panel(points, level=0.9), "two": Panel(points, shown=[])}
    plot_speed_quality(tmp_path / "plot.png", panels, "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_speeds_of_zero_and_more_names_than_places(tmp_path):
    points = [point(f"method {i}", 0.0 if i == 7 else 1.0, 0.5) for i in range(60)]
    shown = [p.method for p in points]
    plot_speed_quality(tmp_path / "plot.png", {"all": Panel(points, shown)}, "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_all_points_and_numbers_of_every_panel_are_seen(tmp_path, monkeypatch):
    """Of three panels in two columns, with speeds far apart, or small."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: seen.append(figure))
    for speeds in ((0.02, 0.05, 0.08), (1.0, 900.0, 0.0)):
        panels = {n: Panel([point(f"{s}", s, 0.5) for s in speeds]) for n in "abc"}
        plot_speed_quality(tmp_path / "plot.png", panels, "title", columns=2)
        axes = [axis for axis in seen.pop().axes if axis.get_visible()]
        low, high = axes[0].get_xlim()
        assert low < min(s for s in speeds if s) and max(speeds) < high
        assert len(axes[0].get_xticks()) >= 3
        for axis in axes[1:]:  # the last ones of their columns
            assert axis.get_xlabel() == "tokens per forward"
            assert any(text.get_visible() for text in axis.get_xticklabels())


def test_the_front_by_hand():
    slow, fast, beaten = point("slow", 1, 0.9), point("fast", 3, 0.8), point("beaten", 2, 0.8)
    assert front([beaten, fast, slow]) == ["slow", "fast"]
    assert front([slow, point("as fast", 1, 0.8)]) == ["slow"]
    assert front([slow, point("as good", 2, 0.9)]) == ["as good"]


def test_names_of_points_at_one_place_do_not_overlap():
    figure = Figure()
    axes = figure.subplots()
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1)  # the points are at the top: names go down
    write_names(axes, [(1.0, 1.0, name, "black") for name in ("one", "two", "three")])
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert all(box.y1 <= axes.bbox.y1 + 1 for box in boxes)
