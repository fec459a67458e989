"""Runs of lines that stand in several places, whatever their names are."""

from __future__ import annotations

import ast
import collections
import io
import itertools
import keyword
import tokenize
from collections.abc import Iterator, Mapping, Sequence

Line = tuple[int, list[str]]  # its number in the file, from 1, and its tokens
Place = tuple[str, int, int]  # file, first and last line


def code_lines(source: str) -> list[Line]:
    """The lines of a file that do something."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and (
            is_text or isinstance(node, ast.Import | ast.ImportFrom)
        ):
            skipped |= {*range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    found: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            found.setdefault(token.start[0], []).append(token.string)
    return [(line, tokens) for line, tokens in found.items() if line not in skipped]


def canonical(lines: Sequence[Line]) -> str:
    """Lines as text; names, but not attributes, are numbered in the order they come up in."""
    numbers: dict[str, int] = {}
    words = []
    for _, tokens in lines:
        before = ""
        for token in tokens:
            is_name = token.isidentifier() and not keyword.iskeyword(token) and before != "."
            words.append(f"name {numbers.setdefault(token, len(numbers))}" if is_name else token)
            before = token
        words.append("\n")
    return " ".join(words)


def duplicates(files: Mapping[str, str], length: int) -> Iterator[tuple[Place, Place]]:
    """Pairs of places with the same run of at least `length` lines, each as long as it can be.

    Args:
      files: sources by name.
      length: lines of code.
    """
    lines = {name: code_lines(source) for name, source in files.items()}
    starts = collections.defaultdict(list)
    for name, own in lines.items():
        for i in range(len(own) - length + 1):
            starts[canonical(own[i : i + length])].append((name, i))
    pairs = {pair for places in starts.values() for pair in itertools.combinations(places, 2)}
    for (a, i), (b, j) in sorted(pairs):
        if ((a, i - 1), (b, j - 1)) in pairs or (a == b and j - i < length):
            continue
        end = length - 1
        while ((a, i + end - length + 2), (b, j + end - length + 2)) in pairs:
            end += 1
        yield (a, lines[a][i][0], lines[a][i + end][0]), (b, lines[b][j][0], lines[b][j + end][0])
