"""The laws that every component obeys: whoever is in the table is tried here.

A row of a batch gives what it gives alone, another number compiles nothing, a run that was
interrupted goes on as if it had not been, a round at a time and rows spread over devices give what
all rounds on one device give, and what a docstring rules out is refused. What a component is for,
its own tests say.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.core.loop import FOREVER
from decode.diffusion.loop import decode, init_state, stream
from decode.diffusion.method import DiffusionMethod
from dlm.params import param_shardings
from dlm.sharding import make_mesh
from tests.lib.docs import check_refusals, check_wrong_kinds
from tests.lib.methods import CASES, NAMES, method_with
from tests.lib.models import TOY_CFG
from tests.lib.tiers import more, often

PROMPTS, LENGTHS, P, G, B = [[3, 7, 1], [5, 2, 9, 4, 4, 8], [11]], [8, 6, 8], 6, 8, 4
REPORTED = ("tokens", "step_map", "num_forwards", "confidence", "log_prob", "end")
every_component = pytest.mark.parametrize(("axis", "cls"), CASES, ids=NAMES)
some_components = pytest.mark.parametrize(("axis", "cls"), more(*CASES), ids=NAMES)


def state_of(method, rows=range(3)):
    return init_state(
        TOY_CFG, method, [PROMPTS[b] for b in rows], gen_len=[LENGTHS[b] for b in rows],
        seeds=list(rows), prompt_len=P, canvas_len=G, batch_size=B,
    )  # fmt: skip


def run(params, method, state, rounds=FOREVER):
    """Always with `max_rounds`, without which it is another program."""
    return decode(params, TOY_CFG, method, state, rounds)


def report(state, rows=range(3)):
    state = jax.device_get({name: getattr(state, name) for name in REPORTED})
    return {name: value[list(rows)] for name, value in state.items()}


def assert_same(a, b):
    for name in REPORTED:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(("axis", "cls"), often(*CASES), ids=NAMES)
def test_rows_are_independent_and_numbers_are_data(toy_params, axis, cls):
    method = method_with(axis, cls)
    before = decode._cache_size()
    batch = run(toy_params, method, state_of(method))
    assert batch.has_stopped.all() and (np.asarray(batch.num_forwards)[:3] > 0).all()
    for b in (0, 2):
        alone = run(toy_params, method, state_of(method, [b]))
        assert_same(report(alone, [0]), report(batch, [b]))
    other = jax.tree.map(lambda x: x * 0.9 if isinstance(x, float) else x, method)
    run(toy_params, other, state_of(other))
    assert decode._cache_size() <= before + 1  # none if another component is at its default, too


@pytest.mark.exhaustive(every=4)
@every_component
def test_in_pieces_is_in_one_go(toy_params, axis, cls):
    """Between the pieces everything is on the host, as if it had been written to a disk."""
    method = method_with(axis, cls)
    whole = run(toy_params, method, state_of(method))
    state, calls = state_of(method), 0
    while not state.has_stopped.all():
        state = jax.tree.map(jnp.array, jax.device_get(state))
        state = run(toy_params, method, state, 2)
        calls += 1
        assert int(state.num_steps) == min(2 * calls, int(whole.num_steps))
    assert_same(report(state), report(whole))


@some_components
def test_round_by_round_is_all_rounds(toy_params, axis, cls):
    method = method_with(axis, cls)
    whole = run(toy_params, method, state_of(method))
    for last in stream(toy_params, TOY_CFG, method, state_of(method)):
        found = report(last)
    assert_same(report(whole), found)


@some_components
def test_sharded_is_unsharded(toy_params, axis, cls):
    method, mesh = method_with(axis, cls), make_mesh(data=2, tensor=2, sequence=2)
    whole = run(toy_params, method, state_of(method))
    params = jax.device_put(toy_params, param_shardings(TOY_CFG, mesh))
    with jax.set_mesh(mesh):
        split = run(params, method, state_of(method))
    assert_same(report(split), report(whole))


@every_component
def test_nonsense_is_refused(axis, cls):
    method = method_with(axis, cls)
    refuse = lambda component: state_of(method.replace(**{axis: component}))
    check_refusals(getattr(method, axis), refuse, TOY_CFG)
    check_wrong_kinds(getattr(method, axis), refuse)


def test_nonsense_beside_the_components_is_refused():
    check_refusals(DiffusionMethod(), state_of)
    check_wrong_kinds(DiffusionMethod(), state_of)
