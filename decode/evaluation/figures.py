"""Speed against quality, drawn: what a panel is about in colour, everything else in grey."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#000000")
GREY = "0.78"
MARKERS = "os^Dv*"


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """One method at one setting, measured.

    Attributes:
      method: what is compared; points of one method are joined by a line and share a colour.
      setting: what else varies; picks the marker, unless it is the same everywhere.
      speed: tokens per forward, or another measure of it; more is faster.
      quality: in [0, 1].
      interval: low and high end of the quality's confidence interval; None: not drawn.
    """

    method: str
    setting: str
    speed: float
    quality: float
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot of a figure.

    Attributes:
      points: all of them.
      shown: methods in colour, with their names; None: all if they are few, else those on the
        `front`.
      level: quality in [0, 1] that others are held against, a dashed line; None: no line.
    """

    points: Sequence[OperatingPoint]
    shown: Sequence[str] | None = None
    level: float | None = None


def front(points: Sequence[OperatingPoint]) -> list[str]:
    """The methods that no other one beats in both speed and quality, from slow to fast."""
    best = -math.inf
    found: dict[str, None] = {}
    for point in sorted(points, key=lambda point: (-point.speed, -point.quality)):
        if point.quality > best:
            best = point.quality
            found[point.method] = None
    return list(found)[::-1]


def plot_speed_quality(
    path: str | os.PathLike[str],
    panels: Mapping[str, Panel],
    title: str,
    speed_label: str = "tokens per forward",
    columns: int = 2,
    quality_label: str = "exact match (%)",
    room: float = 1.9,
) -> None:
    """Writes a PNG of quality against speed, one panel per entry: up and to the right is better.

    Args:
      path: the PNG file to write.
      panels: panel title to what is in it.
      title: of the figure.
      speed_label: of the x axis, which is logarithmic.
      columns: panels side by side, at most.
      quality_label: of the y axis, which is in hundredths.
      room: > 1, how far the x axis goes beyond the fastest point, for names: a factor.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    every = [point for panel in panels.values() for point in panel.points]
    settings = list(dict.fromkeys(point.setting for point in every))
    names = []
    for axis, (name, panel) in zip(axes.flat, panels.items(), strict=False):
        names.append(_draw(axis, panel, settings))
        axis.set_title(name, fontsize=11)
        axis.grid(color="0.93")
        axis.set_axisbelow(True)
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if panel.level is not None:
            axis.axhline(100 * panel.level, color="0.5", linewidth=0.9, linestyle="--", zorder=1)
    high = max(0.1, *(p.speed for p in every))
    low = min((p.speed for p in every if p.speed > 0), default=high)  # of empty answers it is 0
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for column in axes.T:
        axis = [axis for axis in column if axis.get_visible()][-1]
        axis.set_xlabel(speed_label)
        axis.tick_params(labelbottom=True)
        set_log_ticks(axis, low / 1.25, high * room)
    has_intervals = any(point.interval for point in every)
    for axis in axes[:, 0]:
        axis.set_ylabel(quality_label + (", 95 % interval" if has_intervals else ""))
    figure.suptitle(title)
    if len(settings) > 1:
        handles = [
            axes[0][0].plot([], [], MARKERS[i % len(MARKERS)], color="0.4", label=setting)[0]
            for i, setting in enumerate(settings)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.draw_without_rendering()  # so that places are known
    for axis, labels in zip(axes.flat, names, strict=False):
        write_names(axis, labels)
    figure.savefig(path, dpi=130)


def set_log_ticks(axis: Axes, low: float, high: float) -> None:
    """A logarithmic x axis with few, round numbers."""
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    steps = (1, 2, 3, 5) if high < 30 * low else (1, 2, 5) if high < 1000 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()


Name = tuple[float, float, str, str]  # x, y, text, colour


def _draw(axis: Axes, panel: Panel, settings: Sequence[str]) -> list[Name]:
    """The points of a panel, and the names to be written beside them."""
    methods = list(dict.fromkeys(point.method for point in panel.points))
    shown = panel.shown
    if shown is None:
        shown = methods if len(methods) <= len(COLOURS) else front(panel.points)
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(shown)}
    names = []
    for method in sorted(methods, key=lambda method: method in colours):  # grey lies below
        own = sorted((p for p in panel.points if p.method == method), key=lambda p: p.speed)
        colour, is_shown = colours.get(method, GREY), method in colours
        if is_shown:
            axis.plot(
                [p.speed for p in own], [100 * p.quality for p in own], color=colour, alpha=0.5
            )
            names.append((own[-1].speed, 100 * own[-1].quality, method, colour))
        for p in own:
            if is_shown and p.interval is not None:
                axis.plot([p.speed] * 2, [100 * end for end in p.interval], color=colour, alpha=0.3)
            axis.plot(
                p.speed, 100 * p.quality, MARKERS[settings.index(p.setting) % len(MARKERS)],
                color=colour, markersize=7 if is_shown else 5, markeredgecolor="white",
                markeredgewidth=0.7,
            )  # fmt: skip
    low, high = axis.get_ylim()
    high = min(high + 1, 103)  # there is nothing above 100 %
    axis.set_ylim(max(min(low, high - 20), -3), high)  # a point more or less is no cliff
    return names


def write_names(axis: Axes, names: Sequence[Name], size: float = 8.5) -> None:
    """Writes names to the right of points, higher or lower where something is in the way.

    The axes must have their places and limits already.
    """
    scale = 72 / axis.figure.dpi  # points per pixel
    height = 1.25 * size
    # Left, right, middle: of what is in the way.
    points = [scale * axis.transData.transform((x, y)) for x, y, *_ in names]
    taken = [(x - 5, x + 5, y) for x, y in points]
    bottom, top = scale * axis.bbox.y0 + height / 2, scale * axis.bbox.y1 - height / 2
    for x, y, text, colour in sorted(names, key=lambda name: -name[1]):
        left, middle = scale * axis.transData.transform((x, y)) + (7, 0)
        right = left + 0.58 * size * len(text)
        shifts = sorted((sign * n * height for n in range(40) for sign in (-1, 1)), key=abs)
        free = (
            shift
            for shift in shifts
            if bottom <= middle + shift <= top
            and not any(
                left < its_right and right > its_left and abs(middle + shift - its_middle) < height
                for its_left, its_right, its_middle in taken
            )
        )
        shift = next(free, 0.0)
        taken.append((left, right, middle + shift))
        line = {"arrowstyle": "-", "color": colour, "alpha": 0.4} if shift else None
        name = axis.annotate(
            text, (x, y), (7, shift), textcoords="offset points", color=colour, fontsize=size,
            va="center", arrowprops=line, annotation_clip=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
        name.set_in_layout(False)  # places are settled
