"""Speed against quality, drawn."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from matplotlib.artist import Artist


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """One method at one setting, measured.

    Attributes:
      method: what is compared; points of one method are joined by a line and share a colour.
      setting: what else varies; picks the marker, unless it is the same everywhere.
      speed: tokens per forward.
      quality: in [0, 1].
      interval: low and high end of the quality's confidence interval; None: not drawn.
    """

    method: str
    setting: str
    speed: float
    quality: float
    interval: tuple[float, float] | None = None


def plot_speed_quality(
    path: str | os.PathLike[str],
    panels: Mapping[str, Sequence[OperatingPoint]],
    title: str,
    speed_label: str = "tokens per forward",
) -> None:
    """Writes a PNG of quality against speed, one panel per entry.

    Args:
      path: the PNG file to write.
      panels: panel title to points.
      title: of the figure.
      speed_label: of the x axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = [point for points in panels.values() for point in points]
    methods = list(dict.fromkeys(point.method for point in every))
    settings = list(dict.fromkeys(point.setting for point in every))
    has_settings, markers = len(settings) > 1, "os^Dv*<>PXhp8"
    # Dark colours first; with 13 markers 260 methods look different.
    colors = [plt.get_cmap("tab20")((2 * i + i // 10) % 20) for i in range(len(methods))]

    def marker(method: str, setting: str) -> str:
        i = settings.index(setting) if has_settings else methods.index(method)
        return markers[i % len(markers)]

    rows = len(methods) + (len(settings) if has_settings else 0)
    columns = math.ceil(rows / 26)
    width, legend_width = 5.2 * len(panels), 1.7 * columns
    size = (width + legend_width, max(4.4, 0.21 * min(rows, 26) + 1))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (name, points) in zip(axes[0], panels.items(), strict=True):
        for i, method in enumerate(methods):
            own = sorted((p for p in points if p.method == method), key=lambda p: p.speed)
            x, y = [p.speed for p in own], [100 * p.quality for p in own]
            axis.plot(x, y, color=colors[i], alpha=0.5, linewidth=1.2)
            for p in own:
                if p.interval is not None:
                    ends = [100 * end for end in p.interval]
                    axis.plot([p.speed] * 2, ends, color=colors[i], alpha=0.3, linewidth=1)
                # Smaller and smaller, so that points on top of each other are all seen.
                axis.plot(
                    p.speed, 100 * p.quality, marker(method, p.setting), color=colors[i],
                    markersize=9 - 4 * i / len(methods), markeredgecolor="white",
                    markeredgewidth=0.5,
                )  # fmt: skip
        low, high = axis.get_ylim()
        high = min(high + 1, 102)  # there is nothing above 100 %
        axis.set_ylim(min(low, high - 20), high)  # a point more or less is no cliff
        axis.set_title(name)
        axis.set_xlabel(speed_label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    has_intervals = any(point.interval for point in every)
    axes[0][0].set_ylabel("exact match (%)" + (", 95 % interval" if has_intervals else ""))
    handles: list[Artist] = [
        plt.Line2D([], [], color=color, label=method,
                   marker="" if has_settings else marker(method, ""))
        for color, method in zip(colors, methods, strict=True)
    ]  # fmt: skip
    if has_settings:
        handles += [
            plt.Line2D([], [], color="gray", linestyle="", marker=marker("", s), label=s)
            for s in settings
        ]
    figure.legend(handles=handles, loc="center right", frameon=False, fontsize=8, ncols=columns)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, width / (width + legend_width), 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
