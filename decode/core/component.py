"""What the components of all decoding methods share."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flax import struct

from decode.core.requests import real_number, whole_number
from dlm.config import ModelConfig

Kind = TypeVar("Kind")  # of dataclasses
Entry = TypeVar("Entry")


@struct.dataclass
class Part:
    """A small choice that a decoding method is made of.

    Numbers are leaves and are traced; sizes and options are static fields.

    Attributes:
      kind: the class, by name; set by itself. JAX (0.10 to 0.12) compares pytrees of dataclasses by
        their static fields and forgets their types, so without it a compiled program may now and
        then be taken for that of another component with equal fields.
    """

    kind: str = struct.field(pytree_node=False, default="", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", f"{type(self).__module__}.{type(self).__qualname__}")

    def validate(self, cfg: ModelConfig) -> None:
        """Raises ValueError, in one sentence, on values that make no sense. Runs before tracing."""


def entry(table: Mapping[str, Entry], name: str, kind: str = "method") -> Entry:
    """What a table has under a name; ValueError, with names that it has, if nothing."""
    if name in table:
        return table[name]
    if close := difflib.get_close_matches(name, table, n=4, cutoff=0.5):
        raise ValueError(f"there is no {kind} {name!r}; close: {', '.join(close)}")
    names = list(table)
    others = f" and {len(names) - 10} others" if len(names) > 10 else ""
    raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(names[:10])}{others}")


def as_kind(kind: type[Kind], made: Any, **fields: Any) -> Kind:
    """A dataclass of another kind, with the fields that both have and those that are given."""
    both = {f.name for f in dataclasses.fields(kind)} & {f.name for f in dataclasses.fields(made)}  # type: ignore[arg-type]
    return kind(**{name: getattr(made, name) for name in both} | fields)


def check_numbers(made: Any) -> None:
    """Raises ValueError unless the fields of a dataclass that are numbers hold some.

    Those that count hold whole ones, of 32 bits, as programs take them, and switches True or False.
    Fields that hold several numbers are not looked at.
    """
    for field in dataclasses.fields(made):
        kinds = set(re.split(r"\W+", str(field.type)))
        value = getattr(made, field.name)
        if kinds == {"bool"} and not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{field.name}={value!r} must be True or False")
        if (value is None and "None" in kinds) or kinds & {"bool", "str", "tuple", "Sequence"}:
            continue
        if "float" in kinds:
            real_number(field.name, value)
        elif "int" in kinds:
            number = whole_number(field.name, value)
            if not -(2**31) <= number < 2**31:
                raise ValueError(f"{field.name}={number} must be a number of 32 bits, signed")
