"""Trees for measured acceptance and costs: what is counted, and what is made of it."""

import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

from decode.speculative import measured_tree as measuring
from decode.speculative.components import DraftModelTree, PromptLookup
from decode.speculative.loop import SpeculativeMethod, decode, init_state, prefill
from decode.speculative.measured_tree import measured_rates, measured_tree
from decode.speculative.tree import branching, chain, from_paths, optimal_tree
from tests.lib.speculation import texts


@pytest.fixture(scope="module")
def start(plain, toy_params):
    cfg, prompts, _, _ = plain

    def start(method):
        state = init_state(cfg, method, prompts[:8], gen_len=12, chunk=8)
        return prefill(toy_params, cfg, method, state)

    return start


@pytest.mark.exhaustive(every=4)
def test_rates_are_the_share_of_what_was_tried(plain, toy_params, start):
    """Of the target itself the first child is always right; of its first layer, as rounds say."""
    cfg, shape = plain[0], branching(2, 1)
    itself = SpeculativeMethod(DraftModelTree(toy_params, cfg, shape))
    first, *others = measured_rates(toy_params, cfg, itself, start)
    assert first > 0.9 and not any(others)
    layer = SpeculativeMethod(DraftModelTree(toy_params, cfg, from_paths([[0], [1]]), layers=(0,)))
    rates = measured_rates(toy_params, cfg, layer, start)
    state = decode(toy_params, cfg, layer, start(layer))
    histogram = np.asarray(state.acceptance_histogram).sum(axis=0)
    assert sum(rates) == pytest.approx(histogram[1] / histogram.sum(), abs=1e-6)
    assert rates[1] > 0 and sum(rates) < 1


def test_rates_are_probabilities_wherever_they_were_counted(monkeypatch):
    """Behind the root either of two is right; further down there are only first ones."""
    cells = np.zeros((1, 1, 2, 2))  # a row and a grade, by depth and rank
    hits, tries = cells.copy(), cells.copy()
    hits[0, 0], tries[0, 0] = [[60, 40], [95, 0]], [[100, 100], [100, 0]]
    state = types.SimpleNamespace(control=types.SimpleNamespace(hits=hits, tries=tries))
    monkeypatch.setattr(measuring, "decode", lambda *given: state)
    method = SpeculativeMethod(DraftModelTree({}, None, from_paths([[0], [1], [0, 0]])))
    rates = measured_rates({}, None, method, lambda method: None)
    assert rates == pytest.approx([0.775 / 1.175, 0.4 / 1.175])
    optimal_tree(rates, 8, 3)


@pytest.mark.exhaustive
def test_a_tree_for_this_device_writes_the_same_text(plain, toy_params, start, monkeypatch):
    cfg, _, rows, _ = plain
    timed = []

    def with_costs(params, cfg, method, start):
        """Rounds that cost the more, the more they judge; a drafter costs half a round a level."""
        timed.append(type(method.drafter).__name__)
        widths = np.array((1, *method.controller.widths), np.float32)
        levels = method.drafter.depth * (timed[-1] == "DraftModelTree")
        known = dict(costs=jnp.asarray(1 + 0.02 * widths), draft_cost=0.5, draft_forwards=levels)
        return method.replace(controller=method.controller.replace(**known))

    monkeypatch.setattr(measuring, "with_costs", with_costs)
    method = SpeculativeMethod(DraftModelTree(toy_params, cfg, layers=(0,)))
    find = functools.partial(measured_tree, toy_params, cfg, method, start, widths=(1, 2, 8))
    found = find(max_depth=2)
    assert timed == ["Jacobi", "DraftModelTree"]
    assert found.costs == pytest.approx({1: 1.02, 2: 1.04, 8: 1.16})
    assert found.draft_cost == pytest.approx(0.5)
    assert found.shape.num_nodes <= 8 and found.shape.depth <= 2
    judged = min(width for width in found.costs if width >= found.shape.num_nodes)
    cost = found.costs[judged] + 0.5 * found.shape.depth
    assert found.tokens_per_s == pytest.approx(found.tokens_per_round / cost)
    assert found.tokens_per_s >= 1 / 1.02
    chosen = method.replace(drafter=method.drafter.replace(shape=branching(2, 1)))
    state = decode(toy_params, cfg, chosen, start(chosen))
    assert texts(state, 8) == rows[:8]


def test_nonsense_is_refused(plain, toy_params, start):
    cfg = plain[0]
    with pytest.raises(ValueError, match="drafter=PromptLookup must have a field `shape`"):
        measured_tree(toy_params, cfg, SpeculativeMethod(PromptLookup()), start)
    method = SpeculativeMethod(DraftModelTree(toy_params, cfg, chain(2)))
    for widths, max_depth in (((4, 2), 2), ((1,), 2), ((1, 2), 0)):
        with pytest.raises(ValueError, match="must rise from 1"):
            measured_tree(toy_params, cfg, method, start, widths=widths, max_depth=max_depth)
