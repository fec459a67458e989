"""Pictures of decoding: in which step each token was committed, and speed against quality."""

from __future__ import annotations

import dataclasses
import html
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from decode.core.results import Completion
from dlm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Answer:
    """One decoded answer to be shown.

    Attributes:
      prompt: the prompt as text; answers to equal prompts are shown together.
      method: how it was decoded, a short label.
      completion: the answer.
      verdict: whether it is right; None if that is not known.
    """

    prompt: str
    method: str
    completion: Completion
    verdict: bool | None = None


def write_commit_order(
    path: str | os.PathLike[str],
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    title: str = "Order of decoding",
) -> None:
    """Writes a self-contained HTML page of answers, token by token.

    Each token carries the step it was committed in (colour and number, a slider replays the steps)
    and how sure the model was (the bar below it). The page needs no network.

    Args:
      path: the HTML file to write.
      answers: what to show; those with equal prompts are grouped, in the order given.
      tokenizer: turns single ids into text.
      title: heading of the page.
    """
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    last_step = max((int(a.completion.step_map.max()) for a in answers), default=0)
    sections = [
        f"<section><pre>{html.escape(prompt)}</pre>"
        + "".join(_answer_html(answer, tokenizer, last_step) for answer in group)
        + "</section>"
        for prompt, group in groups.items()
    ]
    page = _PAGE.format(title=html.escape(title), last_step=last_step, sections="\n".join(sections))
    pathlib.Path(path).write_text(page, encoding="utf-8")


def _answer_html(answer: Answer, tokenizer: Tokenizer, last_step: int) -> str:
    completion = answer.completion
    mark = {True: " ✓", False: " ✗", None: ""}[answer.verdict]
    chips = []
    for token, step, confidence in zip(
        completion.canvas, completion.step_map, completion.confidence, strict=True
    ):
        if step < 0:
            continue
        text = tokenizer.decode([int(token)], skip_special_tokens=False)
        hue = 220 - 200 * int(step) / max(last_step, 1)  # early: blue, late: red
        chips.append(
            f'<span class="t" data-s="{step}" style="--h:{hue:.0f};--c:{confidence:.4f}" '
            f'title="step {step}, confidence {confidence:.4f}"><i>{step}</i>'
            f"<b>{html.escape(text)}</b></span>"
        )
    return (
        f'<div class="a"><h3>{html.escape(answer.method)}<small>{mark} '
        f"{completion.num_forwards} forwards, "
        f"{completion.tokens_per_forward:.1f} tokens per forward</small></h3>"
        f"<p>{''.join(chips)}</p></div>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222; background: #fff }}
pre {{ white-space: pre-wrap; background: #f3f4f6; padding: .7rem 1rem; border-radius: 6px }}
section {{ margin-bottom: 2.5rem }}
h3 {{ margin: .8rem 0 .1rem; font-size: 1rem }}
small {{ font-weight: normal; color: #555; margin-left: .8rem }}
p {{ margin: 0; line-height: 2.9 }}
.t {{ display: inline-block; position: relative; margin: 0 2px 0 0; padding: 0 5px;
  line-height: 1.5;
  border-radius: 4px 4px 0 0; white-space: pre; background: hsl(var(--h) 85% 90%);
  border-bottom: 4px solid transparent;
  border-image: linear-gradient(90deg, hsl(var(--h) 70% 45%) calc(var(--c) * 100%),
    #ddd calc(var(--c) * 100%)) 1 }}
.t i {{ position: absolute; top: -1.05em; left: 2px; font: normal 10px sans-serif; color: #777 }}
.t b {{ font: inherit }}
.t.off b {{ visibility: hidden }}
.t.off {{ background: #eee; border-image: none; border-bottom-color: #eee }}
.bar {{ position: sticky; top: 0; background: #fff; padding: .6rem 0; z-index: 1;
  border-bottom: 1px solid #ddd }}
input {{ width: 22rem; vertical-align: middle }}
</style></head><body>
<h1>{title}</h1>
<div class="bar"><label>after step <output id="n">{last_step}</output>
<input id="r" type="range" min="-1" max="{last_step}" value="{last_step}"></label>
<button id="p">replay</button>
<small>number and colour: the step that committed a token; bar: how sure the model was</small></div>
{sections}
<script>
const r = document.getElementById("r"), n = document.getElementById("n");
function show() {{
  n.value = r.value < 0 ? "none" : r.value;
  for (const t of document.querySelectorAll(".t"))
    t.classList.toggle("off", +t.dataset.s > +r.value);
}}
r.addEventListener("input", show);
document.getElementById("p").addEventListener("click", () => {{
  r.value = -1; show();
  const timer = setInterval(() => {{
    r.value = +r.value + 1; show();
    if (+r.value >= +r.max) clearInterval(timer);
  }}, 350);
}});
</script></body></html>
"""


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
    handles: list[Any] = [
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
