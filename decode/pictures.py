"""Pictures of how texts came about: in which step each token was written, and what was drafted.

    draw_steps([Answer(prompt, "threshold", answer)], lm.tokenizer)
    draw_drafts(list(watch_drafts(lm, prompt, method="token_recycling"))[:4], lm.tokenizer)

A notebook shows what these give; `savefig` writes it to a file.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decode.drafts import DraftRound
from decode.view import Answer
from dlm.tokenizer import Tokenizer

LINE = 0.3  # inches, of a line of text
CHARACTER = 0.0745  # inches, of a character of FONT
FONT: dict[str, Any] = {
    "family": "monospace",
    "fontsize": 8.9,
}  # a character is 0.602 of its size wide
KEPT, LEFT, OWN = "#9fd8a4", "#e8e8e8", "#a9cdf2"


class Picture(Figure):
    """A figure that shows itself in a notebook."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def draw_steps(answers: Sequence[Answer], tokenizer: Tokenizer, width: int = 100) -> Picture:
    """Answers, token by token, each with the step in which it was decided, as number and colour.

    Args:
      answers: what to show, one below the other; up to the first end of each text.
      tokenizer: turns single ids into text.
      width: of the picture, in characters.
    """
    lines: list[list[tuple[int, str, int]]] = []  # of each: column, text, step
    titles: dict[int, str] = {}
    for answer in answers:
        titles[len(lines)] = _title(answer)
        lines += [[], *_wrapped(_tokens(answer, tokenizer), width)]
    last = max((step for line in lines for _, _, step in line), default=0)
    colors = matplotlib.colormaps["YlGnBu"]
    picture, axes = _page(width, 1.35 * len(lines) + 0.2)
    for i, line in enumerate(lines):
        y = -1.35 * i - 0.8
        if i in titles:
            axes.text(0.5, y, titles[i], fontsize=10, va="center", parse_math=False)
        for column, text, step in line:
            share = step / max(last, 1)
            _chip(axes, column, y, text, colors(0.05 + 0.75 * share), "w" if share > 0.6 else "k")
            axes.text(column, y + 0.62, str(step), fontsize=5.5, color="0.4", va="center")
    return picture


def draw_drafts(rounds: Sequence[DraftRound], tokenizer: Tokenizer) -> Picture:
    """Rounds of draft and verify, one below the other, each as the tree that was judged.

    A token's children stand right of it, the first in its own line. Green ones were kept, and the
    blue one is the target's own, behind them; grey ones were drafted for nothing.

    Args:
      rounds: what to show.
      tokenizer: turns single ids into text.
    """
    nodes = [list(_laid_out(round, tokenizer)) for round in rounds]
    heights = [1.4 + max(line for _, _, line, _, _ in some) for some in nodes]
    ends = [column + _width(text) for some in nodes for column, text, *_ in some]
    picture, axes = _page(max([*ends, 60]) + 1, 1.1 * sum(heights) + 0.8 * len(rounds))
    top = 0.0
    for round, some, height in zip(rounds, nodes, heights, strict=True):
        said = f"round {round.step}: {round.num_accepted} of {round.num_drafts} drafts kept"
        axes.text(0.5, top - 0.6, said, fontsize=10, va="center")
        for column, text, line, color, above in some:
            y = top - 0.8 - 1.1 * (line + 0.7)
            if above is not None:
                x, at = above
                axes.plot([x, column - 0.7, column], [top - 0.8 - 1.1 * (at + 0.7), y, y], "0.7")
            _chip(axes, column, y, text, color, "k")
        top -= 1.1 * height + 0.8
    return picture


def _page(width: float, height: float) -> tuple[Picture, Axes]:
    """A picture of so many characters by lines, which are its coordinates; lines fall from 0."""
    picture = Picture(figsize=(CHARACTER * width, LINE * height), dpi=100)
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(-height, 0))
    axes.axis("off")
    return picture, axes


def _chip(axes: Axes, x: float, y: float, text: str, color: object, ink: str) -> None:
    box = {"boxstyle": "round,pad=0.2", "facecolor": color, "edgecolor": "none"}
    axes.text(x + 0.5, y, text, color=ink, bbox=box, va="center", parse_math=False, **FONT)


def _width(text: str) -> int:
    """Columns of a chip."""
    return len(text) + 1


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token on one line, in which nothing is invisible."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    text = "".join({"\n": "⏎", "\t": "⇥"}.get(x, x) for x in text)
    return text if text.strip() else "␣" * len(text)


def _title(answer: Answer) -> str:
    completion, mark = answer.completion, {True: " ✓", False: " ✗", None: ""}[answer.verdict]
    return (
        f"{answer.method}{mark}    {completion.num_forwards} forwards, "
        f"{completion.tokens_per_forward:.1f} tokens per forward"
    )


def _tokens(answer: Answer, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Texts and steps."""
    completion = answer.completion
    num = len(completion.tokens) + (completion.finish_reason == "eos")
    for token, step in zip(completion.canvas[:num], completion.step_map[:num], strict=True):
        if step >= 0:
            yield _shown(tokenizer, int(token)), int(step)


def _wrapped(tokens: Iterator[tuple[str, int]], width: int) -> Iterator[list[tuple[int, str, int]]]:
    """Lines of columns, texts and steps."""
    line: list[tuple[int, str, int]] = []
    column = 1
    for text, step in tokens:
        if line and column + _width(text) > width:
            yield line
            line, column = [], 1
        line.append((column, text, step))
        column += _width(text) + 1
    yield line


def _laid_out(
    round: DraftRound, tokenizer: Tokenizer
) -> Iterator[tuple[int, str, int, str, tuple[int, int] | None]]:
    """Of the nodes, and of the target's own token: column, text, line, colour, end of the parent.

    Columns are those of the widest text before, lines those of a list of the tree.
    """
    tokens, parents = [*round.tokens], [*round.parents]
    colors = [KEPT if v in round.path else LEFT for v in range(len(tokens))]
    if len(round.written) > round.num_accepted:
        tokens.append(round.written[-1])
        parents.append(round.path[-1])
        colors.append(OWN)
    texts = [_shown(tokenizer, int(token)) for token in tokens]
    depths, lines = [0] * len(tokens), [0] * len(tokens)
    for v in range(1, len(tokens)):
        depths[v] = depths[parents[v]] + 1
    order = _depth_first(parents)
    for before, v in itertools.pairwise(order):
        lines[v] = lines[before] + (parents[v] != before)
    widest = [
        max(_width(t) for t, depth in zip(texts, depths, strict=True) if depth == d)
        for d in range(max(depths) + 1)
    ]
    column = [1 + sum(widest[:d]) + 2 * d for d in range(len(widest))]
    for v, text in enumerate(texts):
        u = parents[v]
        above = None if u < 0 else (column[depths[u]] + _width(texts[u]), lines[u])
        yield column[depths[v]], text, lines[v], colors[v], above


def _depth_first(parents: Sequence[int]) -> list[int]:
    """Node numbers: each before its children, a child's before the next child."""
    children: dict[int, list[int]] = {}
    for v, parent in enumerate(parents):
        children.setdefault(int(parent), []).append(v)
    order, waiting = [], [0]
    while waiting:
        order.append(waiting.pop())
        waiting += reversed(children.get(order[-1], []))
    return order
