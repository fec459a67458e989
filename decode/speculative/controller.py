"""How many drafts are judged in a round: as many as promise most tokens per second, or none.

A forward over n positions takes longer than one over a single position, by how much depends on the
device; how many drafts are accepted depends on the text. So in every round

    who is asked   nobody, while drafts have cost more time than they saved: `debt` says how much,
                   in rounds of plain decoding. A text begins with a `credit`, and every round pays
                   `tolerance` off, so it takes at most 1 + `tolerance` of the time of plain
                   decoding, the credit, and one round that did not pay.
    width          of the drafter's W nodes those n that are most likely to be accepted are judged,
                   where n makes (expected tokens) / (measured seconds) largest

A node is accepted if its parent is, with a probability that is estimated per row, depth and rank
among its siblings: hits h of tries t that fade with `memory`, and what is estimated one level
higher (in the end `prior`) in the place of `weight` further tries,

    c(d, r) = (h + weight c(d - 1, r)) / (t + weight),    c(0, r) = prior (1 - prior)^r

Levels that nobody has tried thus behave like the one above. Both choices are made for the whole
batch, as its rows share a forward; they use nothing but what was seen in earlier rounds and, of
drafts that were not drawn, which of them exist. So a lossless rule stays lossless.

Letters: B rows, W nodes, n nodes that are judged, J depth, R ranks, K widths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.component import Part
from decode.speculative.accept import Walk
from decode.speculative.contracts import Drafter
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig

if TYPE_CHECKING:
    from decode.speculative.loop import SpeculativeMethod

MAX_RANKS = 8  # further siblings count as the last of them
LIKELIEST = 0.99  # of all probabilities that are estimated


class ControllerState(struct.PyTreeNode):
    """What was seen, and what was chosen.

    Attributes:
      hits: [B, J, R] float32. Drafts that were accepted, by depth and rank; fading.
      tries: [B, J, R] float32. Drafts whose parent was accepted; fading.
      debt: [B] float32. Time that drafts may not cost any more, in plain rounds: what they have
        cost more than they saved, less the credit and what was paid off.
      rounds: [B, K + 1] int32. Rounds without drafts, and by the width that was judged.
    """

    hits: jax.Array
    tries: jax.Array
    debt: jax.Array
    rounds: jax.Array


@struct.dataclass
class Controller(Part):
    """Judges as many drafts as pay on this device and this text, and asks for none if none do.

    Attributes:
      widths: how many nodes may be judged, rising; each is compiled. 1: the drafter is asked, but
        nothing it says is likely. None: 1, 3, 12, 48 as far as that is at most half of all, and
        all. Static.
      costs: [K + 1] float32. Seconds of a round without drafts, and by width with drafting it, or
        anything proportional; None: `decode.speculative.costs` measures them.
      prior: in [0.01, 0.99]. How likely the first child of a node is accepted, before any was seen.
      weight: > 0. How many tries the prior counts for.
      memory: in [0, 1]. What a round leaves of what was seen before.
      tolerance: in [0, 1]. Share of the time of plain decoding that may be lost.
      credit: >= 0. Plain rounds that a text may lose besides.
      savings: >= 0. Plain rounds that drafts may lose again of what they have saved.
      fixed: any number. From 0 on it is an index of `costs`, and what is always chosen.
    """

    widths: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    costs: jax.Array | None = None
    prior: jax.Array | float = 0.5
    weight: jax.Array | float = 1.0
    memory: jax.Array | float = 0.95
    tolerance: jax.Array | float = 0.02
    credit: jax.Array | float = 1.0
    savings: jax.Array | float = 4.0
    fixed: jax.Array | int = -1

    def validate(self, cfg: ModelConfig) -> None:
        ranges = {
            "prior": (0.01, 0.99, "in [0.01, 0.99]"),
            "weight": (1e-6, math.inf, "> 0"),
            "memory": (0, 1, "in [0, 1]"),
            "tolerance": (0, 1, "in [0, 1]"),
            "credit": (0, math.inf, "at least 0"),
            "savings": (0, math.inf, "at least 0"),
        }
        for name, (low, high, wanted) in ranges.items():
            value = float(getattr(self, name))
            if not low <= value <= high or value == math.inf:
                raise ValueError(f"{name}={value:g} must be {wanted}")

    def refuse(self, method: SpeculativeMethod) -> str | None:
        """Why it makes no sense beside the other choices of a method, or None."""
        if not method.acceptance.is_lossless:
            rule = type(method.acceptance).__name__
            return f"{rule} is lossy: with a controller the text would depend on what was measured"
        W, widths = method.drafter.num_nodes, self.widths_of(method.drafter)
        if list(widths) != sorted(set(widths)) or not widths or widths[0] < 1 or widths[-1] > W:
            return f"widths={widths} must rise within [1, {W}], the nodes of the drafter's tree"
        if self.costs is None:
            return (
                "the controller has no costs: `complete` measures them, and so does "
                "decode.speculative.costs.with_costs"
            )
        costs = np.asarray(self.costs)
        if costs.shape != (len(widths) + 1,) or not (costs > 0).all():
            return (
                f"costs={costs.tolist()} must be {len(widths) + 1} positive numbers: of a round "
                f"without drafts, and of widths {widths}"
            )
        if int(self.fixed) > len(widths):
            return f"fixed={int(self.fixed)} must be an index of {len(widths) + 1} costs"
        return None

    def widths_of(self, drafter: Drafter) -> tuple[int, ...]:
        """K widths for a drafter."""
        if self.widths is not None:
            return self.widths
        W = drafter.num_nodes
        return (*(w for w in (1, 3, 12, 48) if 2 * w <= W), W)

    def init(self, drafter: Drafter, batch_size: int) -> ControllerState:
        """Nothing was seen yet."""
        ranks = 1 if drafter.is_chain else min(MAX_RANKS, max(1, drafter.num_nodes - 1))
        cells = jnp.zeros((batch_size, max(1, drafter.depth), ranks))
        return ControllerState(
            hits=cells,
            tries=jnp.zeros_like(cells),
            debt=jnp.full(batch_size, -self.credit, jnp.float32),
            rounds=jnp.zeros((batch_size, len(self.widths_of(drafter)) + 1), jnp.int32),
        )

    def asks(self, state: ControllerState, active: jax.Array) -> jax.Array:
        """Whether anybody is to draft in this round, for `active` rows [B]. [] bool."""
        pays = jnp.where(active, state.debt, 0).sum() <= 0
        return jnp.where(jnp.asarray(self.fixed) < 0, pays, jnp.asarray(self.fixed) > 0)

    def choose(
        self,
        drafter: Drafter,
        state: ControllerState,
        tree: DraftTree,
        active: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """What is judged of a tree.

        Returns:
          The choice as an index of `costs`, from 1, and the nodes [B, W] int32 of every row, those
          that are most likely to be accepted first.
        """
        assert self.costs is not None
        reach = self.reach(state, tree, drafter.depth)
        # The root comes first. A parent is likelier than its child, a sibling than the next one.
        reach = reach.at[:, 0].set(1.0)
        if drafter.is_chain:
            nodes = jnp.broadcast_to(jnp.arange(reach.shape[1], dtype=jnp.int32)[None], reach.shape)
        else:
            order = jnp.argsort(reach, axis=1, descending=True, stable=True)
            nodes, reach = order.astype(jnp.int32), jnp.take_along_axis(reach, order, axis=1)
        tokens = jnp.where(active[:, None], jnp.cumsum(reach, axis=1), 0).sum(axis=0)  # [W]
        widths = jnp.array(self.widths_of(drafter))
        speed = tokens[widths - 1] / jnp.asarray(self.costs)[1:]
        best = 1 + jnp.argmax(speed).astype(jnp.int32)
        return jnp.where(jnp.asarray(self.fixed) > 0, self.fixed, best), nodes

    def reach(self, state: ControllerState, tree: DraftTree, depth: int) -> jax.Array:
        """[B, W] float32: how likely each node is accepted; 0 if it does not exist."""
        hits, tries = state.hits, state.tries
        R = hits.shape[2]
        rank = jnp.arange(R, dtype=jnp.float32)
        prior = jnp.asarray(self.prior, jnp.float32)

        def below(
            above: jax.Array, level: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            rate = (level[0] + self.weight * above) / (level[1] + self.weight)
            return rate, rate

        start = jnp.broadcast_to(prior * (1 - prior) ** rank, (len(hits), R))
        rates: jax.Array
        _, rates = jax.lax.scan(below, start, (hits.swapaxes(0, 1), tries.swapaxes(0, 1)))
        # By more than rounding less than the parent's, and than the sibling's before: then the most
        # likely nodes are a tree, and none is among them without the siblings tested before it.
        rates = jax.lax.cummin(jnp.clip(rates.swapaxes(0, 1), 1e-6, LIKELIEST), axis=2)
        log_rates = jnp.log(rates).reshape(len(hits), -1)  # [B, J R]
        of_node = jnp.take_along_axis(log_rates, _cells(tree, R), axis=1)
        of_node += tree.ranks() * math.log(LIKELIEST)
        is_on_way = (tree.depths > 0)[:, None] & tree.ancestors(depth)  # all but the root
        way = jnp.where(is_on_way, of_node[:, None], 0).sum(axis=2)
        return jnp.where(tree.counts, jnp.exp(way), 0)

    def learn(
        self,
        drafter: Drafter,
        state: ControllerState,
        choice: jax.Array,
        tree: DraftTree,
        walk: Walk,
        active: jax.Array,
    ) -> ControllerState:
        """The state after a round.

        Args:
          drafter: of the method.
          state: before it.
          choice: [] int32. What was chosen, as an index of `costs`.
          tree: the n nodes that were judged.
          walk: through the tree.
          active: [B] bool. Rows that took part.
        """
        assert self.costs is not None
        hits, tries = self.memory * state.hits, self.memory * state.tries
        n = tree.tokens.shape[1]
        if n > 1:
            is_kept = jnp.arange(walk.path.shape[1])[None] <= walk.num_accepted[:, None]
            on_path = (walk.path[..., None] == jnp.arange(n)[None, None]) & is_kept[..., None]
            on_path = on_path.any(axis=1)  # [B, n]
            parent = jnp.maximum(tree.parents, 0)
            is_tried = jnp.take_along_axis(on_path, parent, axis=1) & tree.counts
            is_tried &= (tree.depths > 0) & active[:, None]
            cell, rows = _cells(tree, hits.shape[2]), jnp.arange(len(hits))[:, None]

            def add(to: jax.Array, what: jax.Array) -> jax.Array:
                flat = to.reshape(len(to), -1)
                return flat.at[rows, cell].add(what.astype(to.dtype)).reshape(to.shape)

            hits, tries = add(hits, is_tried & on_path), add(tries, is_tried)
        costs = jnp.asarray(self.costs)
        saved = walk.num_accepted + 1 - costs[choice] / costs[0]
        debt = jnp.maximum(state.debt - saved - self.tolerance, -self.savings)
        keep = lambda new, old: jnp.where(  # noqa: E731
            active.reshape(-1, *[1] * (new.ndim - 1)), new, old
        )
        return ControllerState(
            hits=keep(hits, state.hits),
            tries=keep(tries, state.tries),
            debt=keep(debt, state.debt),
            rounds=state.rounds.at[:, choice].add(active.astype(jnp.int32)),
        )


def _cells(tree: DraftTree, ranks: int) -> jax.Array:
    """[B, W] int32: a node's number among depths and ranks; the root has the first child's."""
    rank = jnp.minimum(tree.ranks(), ranks - 1) if ranks > 1 else 0
    return jnp.maximum(tree.depths - 1, 0) * ranks + rank
