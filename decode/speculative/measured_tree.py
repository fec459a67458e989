"""The tree that writes most tokens per second here: for this text's acceptance and these costs.

Reference: Chen et al., "Sequoia", arXiv:2402.12374, Sec. 4; see `decode.speculative.tree`. Measured
are

    rates        of each rank among siblings, the share of nodes whose parent was accepted that were
                 accepted themselves: by rounds of a large tree, as a controller counts them. Deep
                 nodes have few siblings, so that first ones are counted elsewhere than others: if
                 the shares sum to more than 1, they are taken in proportion
    costs        seconds of a round by the nodes it judges, drafted for free
    draft cost   seconds that such a drafter takes more, per level
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decode.speculative.contracts import Drafter
from decode.speculative.controller import MAX_RANKS, Controller, ControllerState
from decode.speculative.costs import with_costs
from decode.speculative.drafters.jacobi import Jacobi
from decode.speculative.loop import SpeculativeMethod, SpeculativeState, decode
from decode.speculative.tree import TreeShape, expected_tokens, fastest_tree, optimal_tree
from dlm.config import ModelConfig
from dlm.params import Params

Start = Callable[[SpeculativeMethod], SpeculativeState]


@dataclasses.dataclass(frozen=True)
class MeasuredTree:
    """A tree, and what it was chosen by.

    Attributes:
      shape: of the tree.
      tokens_per_s: that it promises, per row.
      tokens_per_round: likewise.
      rates: by rank, from the first child on.
      costs: seconds of a round by nodes.
      draft_cost: seconds per level.
    """

    shape: TreeShape
    tokens_per_s: float
    tokens_per_round: float
    rates: tuple[float, ...]
    costs: dict[int, float]
    draft_cost: float


def measured_tree(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    start: Start,
    *,
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64),
    max_depth: int = 8,
) -> MeasuredTree:
    """Measures, and chooses.

    Args:
      params, cfg: the target.
      method: how to decode, without a controller; of its drafter the field `shape` is chosen.
      start: a first state, after `prefill`, of a method: of typical prompts.
      widths: rising numbers of nodes, with the root, of which the tree will have one.
      max_depth: >= 1, of the tree.

    Raises:
      ValueError: the drafter has no shape to choose, or widths do not rise.
    """
    if "shape" not in {field.name for field in dataclasses.fields(method.drafter)}:
        raise ValueError(
            f"drafter={type(method.drafter).__name__} must have a field `shape`, which is chosen"
        )
    if list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] < 2 or max_depth < 1:
        raise ValueError(f"widths={widths} must rise from 1, and max_depth={max_depth} be positive")
    probe = optimal_tree([0.5 ** (r + 1) for r in range(MAX_RANKS)], widths[-1], max_depth)
    drafter: Any = method.drafter
    large = method.replace(drafter=drafter.replace(shape=probe))
    free = seconds(params, cfg, method.replace(drafter=Jacobi(widths[-1] - 1)), start, widths)
    n = probe.num_nodes  # fewer than widths[-1] where the tree may not be deep
    same = free
    if n not in same:
        same = seconds(params, cfg, method.replace(drafter=Jacobi(n - 1)), start, (n,))
    draft_cost = max(0.0, seconds(params, cfg, large, start, (n,))[n] - same[n]) / probe.depth
    rates = measured_rates(params, cfg, large, start)
    shape, speed = fastest_tree(rates, free, draft_cost, max_depth)
    return MeasuredTree(shape, speed, expected_tokens(shape, rates), rates, free, draft_cost)


def seconds(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    start: Start,
    widths: tuple[int, ...],
) -> dict[int, float]:
    """Of a round with all that is drafted, by the nodes of the method's tree that are judged."""
    asked = method.replace(controller=Controller(widths=widths))
    known = with_costs(params, cfg, asked, start).controller
    assert known is not None and known.costs is not None
    drafting = float(known.draft_cost) * float(known.draft_forwards)
    whole = np.asarray(known.costs)[1:] + drafting
    return dict(zip(widths, whole.tolist(), strict=True))


def measured_rates(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, start: Start
) -> tuple[float, ...]:
    """How likely a child of each rank is the one that is accepted, over whole texts."""
    drafter: Drafter = method.drafter
    counts_all = Controller(widths=(drafter.num_nodes,), costs=jnp.ones(2), memory=1.0, fixed=1)
    counted = method.replace(controller=counts_all)
    state = decode(params, cfg, counted, start(counted))
    control: ControllerState = jax.device_get(state.control)
    hits, tries = (x.sum(axis=(0, 1, 2)) for x in (control.hits, control.tries))
    rates = np.asarray(hits / np.maximum(tries, 1))
    return tuple((rates / max(1.0, float(rates.sum()))).tolist())
