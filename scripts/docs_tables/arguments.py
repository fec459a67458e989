"""What becomes of other tools' arguments: from signatures and docstrings of `public`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any


def arguments(decoder: Callable[..., Any]) -> dict[str, str]:
    """What a docstring's `Args:` says of each argument, on one line.

    Raises:
      ValueError: it speaks of other arguments than there are.
    """
    doc = inspect.getdoc(decoder) or ""
    section = doc.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n(?=  \w)", section.rstrip())
    said = {}
    for entry in filter(None, entries):
        name, _, text = entry.strip().partition(":")
        said[name] = " ".join(text.split())
    if list(said) != list(inspect.signature(decoder).parameters):
        raise ValueError(f"{decoder.__name__}: the docstring tells of {', '.join(said)}")
    return said


def section(decoder: Callable[..., Any]) -> str:
    """A heading, what the decoder is for, and its arguments."""
    doc = inspect.getdoc(decoder) or ""
    about = doc.partition("Args:\n")[0].strip()
    rows = ["| there | default | here |", "|---|---|---|"]
    parameters = inspect.signature(decoder).parameters
    for name, text in arguments(decoder).items():
        rows.append(f"| `{name}` | `{parameters[name].default!r}` | {text} |")
    return f"### `{decoder.__name__}`\n\n{about}\n\n" + "\n".join(rows)


def sections(decoders: Iterable[Callable[..., Any]]) -> str:
    """All of them."""
    return "\n\n".join(section(decoder) for decoder in decoders)
