"""What docstrings say of the fields of a class: their ranges, and the shapes of arrays."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

_FIELD = re.compile(r"  (\w[\w, ]*): (.*)")
_INTERVAL = re.compile(r"\bin ([\[(])([-\w.]+), ([-\w.]+)([\])])")
_OPTION = re.compile(r'"\w+"')
_LOWEST = re.compile(r"(?:(>=|>)|\bat least) (-?\d[\d.]*)")


def attributes(kind: type) -> dict[str, str]:
    """What is said of each field of a class under `Attributes:`, its bases' fields included."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        doc = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
        _, _, listed = doc.partition("Attributes:\n")
        names: list[str] = []
        for line in listed.splitlines():
            if match := _FIELD.fullmatch(line):
                names = match[1].split(", ")
                found |= dict.fromkeys(names, match[2])
            elif line.startswith("    "):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            elif line.strip():
                break
    return found


def nonsense(made: Any, *known: Any) -> list[tuple[str, Any]]:
    """Fields of a dataclass instance, with values that their docstring rules out.

    Of a field that is a number these are one below and one above its range, as far as it has ends,
    and NaN; of one that is a choice of texts, a word that is not among them.

    Args:
      made: the instance.
      *known: other objects, whose attributes may be named as the ends of a range.

    Raises:
      ValueError: a docstring does not say what a number may be.
    """
    said, found = attributes(type(made)), []
    for field in dataclasses.fields(made):
        kinds = set(re.split(r"\W+", str(field.type)))
        if kinds & {"int", "float"} and not kinds & {"bool", "tuple", "str"}:
            if field.name not in said:
                raise ValueError(f"{type(made).__name__}.{field.name} is not documented")
            values = _outside(said[field.name], "float" not in kinds, (made, *known))
            if values is None:
                raise ValueError(
                    f"{type(made).__name__}.{field.name} must say its range, such as 'in [0, 1]', "
                    f"'>= 1' or 'any number', not only: {said[field.name]}"
                )
            found += [(field.name, value) for value in values]
        elif kinds == {"str"} and field.name != "kind" and _OPTION.search(said[field.name]):
            found.append((field.name, "nonsense"))
    return found


def check_refusals(made: Any, refuse: Callable[[Any], object], *known: Any) -> None:
    """Every `nonsense` is refused by a ValueError: a sentence with the field and its value.

    `refuse` is called with the instance changed; instances may refuse to be made, too.
    """
    for name, value in nonsense(made, *known):
        with pytest.raises(ValueError) as error:
            refuse(dataclasses.replace(made, **{name: value}))
        message = str(error.value)
        assert f"{name}=" in message and " must " in message and "\n" not in message, message


def _outside(text: str, is_whole: bool, known: tuple[Any, ...]) -> list[Any] | None:
    """Values that a range rules out; None if there is none in the text."""
    step: Any = 1 if is_whole else 0.25
    bounds = []  # (how far outside of it, whether it is itself outside)
    if match := _INTERVAL.search(text):
        bounds = [(match[2], -step, match[1] == "("), (match[3], step, match[4] == ")")]
    elif match := _LOWEST.search(text):
        bounds = [(match[2], -step, match[1] == ">")]
    elif "any number" not in text:
        return None
    values = []
    for bound, away, is_open in bounds:
        number = _number(bound, known)
        values.append((int if is_whole else float)(number if is_open else number + away))
    return values if is_whole else [*values, float("nan")]


def _number(text: str, known: tuple[Any, ...]) -> float:
    """A number, or the attribute of that name."""
    if re.fullmatch(r"-?\d[\d.]*", text):
        return float(text)
    return float(next(getattr(owner, text) for owner in known if hasattr(owner, text)))
