"""The laws that every component obeys: whoever is in the table is tried here.

A row of a batch gives what it gives alone, another number compiles nothing, and a round at a time
gives what all rounds at once give. What a component is for, its own tests say.
"""

import jax
import numpy as np
import pytest

from decode.diffusion.components import COMPONENTS
from decode.diffusion.loop import decode, init_state, stream
from decode.diffusion.points import METHODS, complete, named
from tests.lib.models import TOY_CFG
from tests.lib.tiers import more

PROMPTS, LENGTHS, P, G = [[3, 7, 1], [5, 2, 9, 4, 4, 8], [11]], [8, 6, 8], 6, 8
REPORTED = ("tokens", "step_map", "num_forwards", "confidence", "log_prob", "end")
CASES = [(axis, cls) for axis, classes in COMPONENTS.items() for cls in classes]


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


def state_of(method, rows):
    return init_state(
        TOY_CFG, method, [PROMPTS[b] for b in rows], gen_len=[LENGTHS[b] for b in rows],
        seeds=list(rows), prompt_len=P, canvas_len=G, batch_size=len(PROMPTS),
    )  # fmt: skip


def report(state, row):
    return {name: np.asarray(getattr(state, name))[row] for name in REPORTED}


def assert_same(a, b):
    for name in REPORTED:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("axis", "cls"), CASES, ids=[cls.__name__ for _, cls in CASES])
def test_rows_are_independent_and_numbers_are_data(toy_params, axis, cls):
    method = method_with(axis, cls)
    before = decode._cache_size()
    batch = decode(toy_params, TOY_CFG, method, state_of(method, range(3)))
    assert batch.has_stopped.all() and (np.asarray(batch.num_forwards) > 0).all()
    for b in (0, 2):
        alone = decode(toy_params, TOY_CFG, method, state_of(method, [b]))
        assert_same(report(alone, 0), report(batch, b))
    other = jax.tree.map(lambda x: x * 0.9 if isinstance(x, float) else x, method)
    decode(toy_params, TOY_CFG, other, state_of(other, range(3)))
    assert decode._cache_size() <= before + 1  # none if another component is at its default, too


@pytest.mark.parametrize(("axis", "cls"), more(*CASES), ids=[cls.__name__ for _, cls in CASES])
def test_round_by_round_is_all_rounds(toy_params, axis, cls):
    method = method_with(axis, cls)
    batch = decode(toy_params, TOY_CFG, method, state_of(method, range(3)))
    reports = [report(batch, b) for b in range(3)]
    for last in stream(toy_params, TOY_CFG, method, state_of(method, range(3))):
        found = [report(last, b) for b in range(3)]
    for a, b in zip(reports, found, strict=True):
        assert_same(a, b)
