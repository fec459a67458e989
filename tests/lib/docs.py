"""What docstrings say of the fields of a class, and whether it is so: ranges and shapes."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

_FIELD = re.compile(r"  (\w[\w, ]*): (.*)")
_INTERVAL = re.compile(r"\bin ([\[(])([-\w.]+), ([-\w.]+)([\])])")
_OPTION = re.compile(r'"\w+"')
_LOWEST = re.compile(r"(?:(>=|>)|\bat least) (-?\d[\d.]*)")
_SHAPE = re.compile(r"(?:\[([^\]]*)\]|(\bscalar\b))(?: (bool|b?float\d+|u?int\d+)\b)?")
_NAME = re.compile(r"[A-Za-z]\w*")


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


def check_wrong_kinds(made: Any, refuse: Callable[[Any], object]) -> None:
    """What is no number where one must be, or no whole one, is refused as by `check_refusals`."""
    for field in dataclasses.fields(made):
        kinds = set(re.split(r"\W+", str(field.type)))
        if not kinds & {"int", "float"} or kinds & {"bool", "tuple", "str"}:
            continue
        for value in ("1", [1.0], True, *([] if "float" in kinds else [1.5])):
            with pytest.raises(ValueError) as error:
                refuse(dataclasses.replace(made, **{field.name: value}))
            whole = "a number" if "float" in kinds else "a whole number"
            assert str(error.value) == f"{field.name}={value!r} must be {whole}"


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


def check_shapes(made: Any, checked: set[type], everywhere: dict[str, int], **here: int) -> None:
    """Arrays of a dataclass instance, and of those in it, are what its docstring says.

    Rank, dtype (some float where none is said) and sizes: a letter stands for one number in an
    instance, and some are known.

    Args:
      made: the instance; arrays may be abstract.
      checked: gets the classes that were looked at, and their bases.
      everywhere: letters that stand for one number in all instances.
      **here: letters that do in this one.
    """
    checked.update(type(made).__mro__)
    said, known = attributes(type(made)), everywhere | here
    for field in dataclasses.fields(made):
        value, text = getattr(made, field.name), said.get(field.name, "")
        where = f"{type(made).__name__}.{field.name}"
        if dataclasses.is_dataclass(value):
            if each := re.search(r"each \[([^\]]*), \.\.\.\]", text):
                value = _flatten(value, len(each[1].split(",")))
            check_shapes(value, checked, everywhere)
        elif not set(re.split(r"\W+", str(field.type))) & {"Any", "float", "int"}:
            for array, shape in zip(*_arrays(value, text, where), strict=True):
                _check(array, shape, known, where)


def states_shape(doc: str | None) -> re.Match[str] | None:
    """The shape with which a docstring begins, perhaps after a word."""
    return re.match(rf"(?:(?!in )\w+ )?{_SHAPE.pattern}", doc or "")


def _arrays(value: Any, text: str, where: str) -> tuple[list[Any], list[re.Match[str]]]:
    """The arrays of a field, and as many shapes of its text."""
    arrays = [x for x in (value if isinstance(value, tuple) else (value,)) if hasattr(x, "dtype")]
    if not arrays or jnp.issubdtype(arrays[0].dtype, jax.dtypes.extended):  # a key of `jax.random`
        return [], []
    if not states_shape(text):
        raise AssertionError(f"{where} must begin with its shape, not: {text}")
    return arrays, list(_SHAPE.finditer(text))[: len(arrays)]


def _check(array: Any, shape: re.Match[str], known: dict[str, int], where: str) -> None:
    dims = [] if shape[2] else shape[1].split(", ")
    if dims[-1:] == ["..."]:
        dims = [*dims[:-1], *map(str, array.shape[len(dims) - 1 :])]
    assert len(dims) == len(array.shape), f"{where} is {array.shape}, not {shape[0]}"
    for dim, size in zip(dims, array.shape, strict=True):
        expression = re.sub(r"(\w) (?=[A-Za-z])", r"\1 * ", dim)
        unknown = set(_NAME.findall(expression)) - {"ceil", *known}
        assert len(unknown) <= 1, f"{where}: {shape[0]} has two unknown letters in {dim}"
        value = lambda e=expression, **more: eval(e, {"ceil": math.ceil}, known | more)
        if unknown:
            (letter,) = unknown
            fitting = [n for n in range(size * 33 + 33) if value(**{letter: n}) == size]
            assert fitting, f"{where} is {array.shape}, not {shape[0]}"
            known[letter] = fitting[0]
        assert value() == size, f"{where} is {array.shape}, not {shape[0]} with {known}"
    said, found = shape[3], array.dtype
    right = found == said if said else jnp.issubdtype(found, jnp.floating)
    assert right, f"{where} is {found}, not {said or 'of a float'}"


def _flatten(made: Any, num: int) -> Any:
    """The same with the first axes of every array made one."""
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    flat = {
        name: jax.ShapeDtypeStruct((math.prod(x.shape[:num]), *x.shape[num:]), x.dtype)
        for name, x in fields.items()
        if x is not None
    }
    return dataclasses.replace(made, **flat)
