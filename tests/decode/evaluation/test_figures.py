"""Figures are written."""

from decode.evaluation.figures import OperatingPoint, plot_speed_quality


def test_a_figure_of_two_panels(tmp_path):
    points = [OperatingPoint("quota", "none", 1.0, 0.9), OperatingPoint("quota", "dual", 2.0, 0.8)]
    plot_speed_quality(tmp_path / "plot.png", {"one": points, "two": points}, "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
