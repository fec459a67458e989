"""Pictures of how texts came about: which step wrote each token, what was drafted, what was tried.

    draw_steps([Answer(prompt, "threshold", answer)], lm.tokenizer)
    draw_drafts(list(watch_drafts(lm, prompt, method="token_recycling"))[:4], lm.tokenizer)
    draw_search(watch_search(lm, prompt, method="beam_4", gen_len=8))

A notebook shows what these give; `savefig` writes it to a file.
"""

from __future__ import annotations

import collections
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decode.core.explored import Node
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
FATES = {"won": KEPT, "found": "#f6d98b", "kept": OWN, "dropped": LEFT}  # of what was tried
TRUNK = 0.6  # columns, between lines that go down side by side
SMALL: dict[str, Any] = {"family": "monospace", "fontsize": 5.5, "color": "0.35"}


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


def draw_search(nodes: Sequence[Node], title: str = "") -> Picture:
    """What a search explored, as a tree: what was tried behind something stands right of it.

    Green is the way to the best text, and yellow the end of each other one that was found; from the
    blue ones the search went on for a while, the grey ones were dropped at once. Below each stands
    its score, and what it is made of, if there are parts.

    Args:
      nodes: what was tried; parents come before what stands behind them.
      title: of the picture.

    Raises:
      ValueError: on a parent that does not come before its child, or a fate that there is not.
    """
    for number, node in enumerate(nodes):
        if not -1 <= node.parent < number:
            raise ValueError(f"parent={node.parent} of node {number} must be in [-1, {number})")
        if node.fate not in FATES:
            raise ValueError(f"fate={node.fate!r} of node {number} must be in {sorted(FATES)}")
    texts, notes = [_on_one_line(node.text) for node in nodes], [_note(node) for node in nodes]
    widths = [max(_width(t), 0.65 * len(n)) for t, n in zip(texts, notes, strict=True)]
    depths, lines = _stacked(nodes)
    most = [0.0] * (1 + max(depths, default=0))
    for depth, wide in zip(depths, widths, strict=True):
        most[depth] = max(most[depth], wide)
    bends = _bends(nodes, depths, lines)
    room = [2.0 + TRUNK * sum(depths[v] == d for v in bends) for d in range(len(most))]
    column = [1 + sum(most[:d]) + sum(room[:d]) for d in range(len(most))]
    height = 1.6 * (1 + max(lines, default=0)) + 1.6
    end = max((column[d] + w for d, w in zip(depths, widths, strict=True)), default=0)
    picture, axes = _page(max(end, len(title)) + 1, height)
    axes.text(0.5, -0.6, title, fontsize=10, va="center", parse_math=False)
    at = [(column[d], -1.6 - 1.6 * line) for d, line in zip(depths, lines, strict=True)]
    for node, text, note, (x, y) in zip(nodes, texts, notes, at, strict=True):
        if node.parent >= 0:
            before, above = at[node.parent]
            start = before + _width(texts[node.parent])
            bend = x - 1.1 - TRUNK * bends[node.parent]
            ink, layer = ("#4fa85a", 1) if node.fate == "won" else ("0.75", 0)
            axes.plot([start, bend, bend, x], [above, above, y, y], color=ink, zorder=layer, lw=1)
        _chip(axes, x, y, text, FATES[node.fate], "k")
        axes.text(x + 0.3, y - 0.68, note, va="center", parse_math=False, **SMALL)
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
    return _on_one_line(tokenizer.decode([token], skip_special_tokens=False))


def _on_one_line(text: str) -> str:
    """A text in which nothing is invisible."""
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
    # Of an answer whose prompt had gaps, `tokens` begin before the canvas does.
    written, canvas = completion.tokens.tolist(), completion.canvas.tolist()
    most = min(len(written), len(canvas))
    num = next(n for n in range(most, -1, -1) if written[len(written) - n :] == canvas[:n])
    num += completion.finish_reason == "eos"
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


def _note(node: Node) -> str:
    """What stands below a node."""
    said = [] if node.score is None else [f"{node.score:.2f}"]
    shown = lambda x: f"{x:.0f}" if float(x).is_integer() else f"{x:.2f}"  # noqa: E731
    return " ".join(said + [f"{name} {shown(value)}" for name, value in node.parts.items()])


def _bends(nodes: Sequence[Node], depths: list[int], lines: list[int]) -> dict[int, int]:
    """Of nodes with others behind them, where their line turns: places from the right.

    The upper ones turn later, so that lines do not cross.
    """
    parents = sorted({node.parent for node in nodes if node.parent >= 0}, key=lambda v: lines[v])
    seen, bends = collections.Counter[int](), {}
    for v in parents:
        bends[v] = seen[depths[v]]
        seen[depths[v]] += 1
    return bends


def _stacked(nodes: Sequence[Node]) -> tuple[list[int], list[int]]:
    """Depth and line of each: on that of its parent, or on the first below that is free there.

    The way to the best text is on the first line.
    """
    children: dict[int, list[int]] = {}
    for v, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(v)
    rank = {fate: i for i, fate in enumerate(FATES)}
    for siblings in children.values():
        siblings.sort(key=lambda v: rank[nodes[v].fate])
    depths, lines, free = [0] * len(nodes), [0] * len(nodes), collections.Counter[int]()
    waiting = children.get(-1, [])[::-1]
    while waiting:
        v = waiting.pop()
        parent = nodes[v].parent
        if parent >= 0:
            depths[v], lines[v] = depths[parent] + 1, lines[parent]
        lines[v] = max(lines[v], free[depths[v]])
        free[depths[v]] = lines[v] + 1
        waiting += children.get(v, [])[::-1]
    return depths, lines
