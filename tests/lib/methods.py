"""Methods of which any component is a part."""

import functools

import pytest

from decode.diffusion.components import COMPONENTS
from decode.diffusion.points import METHODS, complete, named
from tests.lib.models import TOY_CFG

CASES = [(axis, cls) for axis, classes in COMPONENTS.items() for cls in classes]
NAMES = [cls.__name__ for _, cls in CASES]


@functools.cache
def method_with(axis, cls):
    """A method that a component is part of: its example beside defaults, or a named one."""
    example = cls.example(TOY_CFG)
    candidates = [complete(n, **{axis: example}) for n in (4, 32)]
    candidates += [
        method for name in METHODS if type(getattr(method := named(name, 4), axis)) is cls
    ]
    for method in candidates:
        try:
            method.validate(TOY_CFG)
        except ValueError:
            continue
        return method
    pytest.fail(
        f"{cls.__name__} is part of no method that makes sense: give it an example or a point"
    )
