"""How many drafts are judged in a round: as many as promise most tokens per second, or none.

A forward over n positions takes longer than one over a single position, by how much depends on the
device; how many drafts are accepted depends on the text. So in every round

    budget         rounds of plain decoding that may be lost yet: a `credit` at first, then what
                   drafts have saved, less what they have cost, and `tolerance` for every round
    who is asked   nobody, while the budget does not cover a round with drafts of which none is
                   kept; who drafts as long as it is sure makes no more forwards than it covers
    width          of the drafter's W nodes those n that are most likely to be accepted are judged,
                   where n makes (expected tokens) / (measured seconds) largest among those widths
                   that the budget covers; seconds are those of judging, and of every forward of
                   the drafter's own that was made

A text thus takes at most 1 + `tolerance` of the time of plain decoding, and the credit.

A node is accepted if its parent is, with a probability that is estimated per row, grade (how sure
the drafter is of the whole proposal), depth and rank among its siblings: hits h of tries t that
fade with `memory`, and what is estimated one level higher (in the end `prior` to `surest`, by the
grade) in the place of `weight` further tries,

    c(d, r) = (h + weight c(d - 1, r)) / (t + weight),    c(0, r) = p (1 - p)^r
    p = prior + (surest - prior) (grade + 1) / (N + 1)

Levels that nobody has tried thus behave like the one above. A draft is tried when the token before
it is written, be it judged or not: the token that the target then chose says whether it would have
been right, so watching a drafter costs no more than its drafts. Both choices are made for the whole
batch, as its rows share a forward; they use nothing but what was seen in earlier rounds and, of
drafts that were not drawn, which of them exist; of trees whose shape was drawn the first nodes are
judged, and the first of each level counts as all others' parent. So a lossless rule stays lossless.

Letters: B rows, W nodes, n nodes that are judged, N grades, J depth, R ranks, K widths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.component import Part
from decode.core.loop import of_rows
from decode.speculative.accept import Walk
from decode.speculative.contracts import Drafter, Proposal
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig

if TYPE_CHECKING:
    from decode.speculative.loop import SpeculativeMethod

MAX_RANKS = 8  # further siblings count as the last of them
LIKELIEST = 0.99  # of all probabilities that are estimated


class ControllerState(struct.PyTreeNode):
    """What was seen, and what was chosen.

    Attributes:
      hits: [B, N, J, R] float32. Drafts that were right, by grade, depth and rank; fading.
      tries: [B, N, J, R] float32. Drafts whose parent was right; fading.
      budget: [B] float32. Time that drafts may cost yet, in plain rounds.
      rounds: [B, K + 1] int32. Rounds without drafts, and by the width that was judged.
    """

    hits: jax.Array
    tries: jax.Array
    budget: jax.Array
    rounds: jax.Array


@struct.dataclass
class Controller(Part):
    """Judges as many drafts as pay on this device and this text, and asks for none if none do.

    Attributes:
      widths: how many nodes may be judged, rising; each is compiled. 1: the drafter is asked, but
        nothing it says is likely. None: 1, 4, 8, 24 as far as that is at most three quarters of
        all, and all. Static.
      costs: [K + 1] float32. Seconds of a round without drafts, and by width with drafting it, but
        for forwards of the drafter's own, or anything proportional; None:
        `decode.speculative.costs` measures these three.
      draft_cost: >= 0. Seconds of a forward of the drafter's own.
      draft_forwards: >= 0. How many of them it makes in a round, if it heeds no limit.
      prior: in [0.01, 0.99]. How likely the first child of a node is accepted, before any was seen,
        where the drafter could not be less sure.
      surest: in [0.01, 0.99]. The same where it could not be more sure; without grades it is half
        way between.
      weight: > 0. How many tries the prior counts for.
      memory: in [0, 1]. What a round leaves of what was seen before.
      tolerance: in [0, 1]. Share of the time of plain decoding that may be lost.
      credit: >= 0. Plain rounds that a text may lose besides.
      savings: >= 0. Plain rounds that drafts may lose again of what they have saved; at least one
        round of the widest tree.
      fixed: any number. From 0 on it is an index of `costs`, and what is always chosen.
    """

    widths: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    costs: jax.Array | None = None
    draft_cost: jax.Array | float = 0.0
    draft_forwards: jax.Array | float = 0.0
    prior: jax.Array | float = 0.25
    surest: jax.Array | float = 0.85
    weight: jax.Array | float = 2.0
    memory: jax.Array | float = 0.95
    tolerance: jax.Array | float = 0.01
    credit: jax.Array | float = 1.0
    savings: jax.Array | float = 4.0
    fixed: jax.Array | int = -1

    def validate(self, cfg: ModelConfig) -> None:
        ranges = {
            "draft_cost": (0, math.inf, "at least 0"),
            "draft_forwards": (0, math.inf, "at least 0"),
            "prior": (0.01, 0.99, "in [0.01, 0.99]"),
            "surest": (0.01, 0.99, "in [0.01, 0.99]"),
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
        return (*(w for w in (1, 4, 8, 24) if 4 * w <= 3 * W), W)

    def init(self, drafter: Drafter, batch_size: int) -> ControllerState:
        """Nothing was seen yet."""
        ranks = 1 if drafter.is_chain else min(MAX_RANKS, max(1, drafter.num_nodes - 1))
        cells = jnp.zeros((batch_size, drafter.num_grades, max(1, drafter.depth), ranks))
        return ControllerState(
            hits=cells,
            tries=jnp.zeros_like(cells),
            budget=jnp.full(batch_size, self.credit, jnp.float32),
            rounds=jnp.zeros((batch_size, len(self.widths_of(drafter)) + 1), jnp.int32),
        )

    def asks(self, drafter: Drafter, state: ControllerState, active: jax.Array) -> jax.Array:
        """Whether anybody is to draft in this round, for `active` rows [B]. [] bool."""
        pays = self._loss_of_a_try(drafter) <= _mean(state.budget, active)
        return jnp.where(jnp.asarray(self.fixed) < 0, pays, jnp.asarray(self.fixed) > 0)

    def most_forwards(
        self, drafter: Drafter, state: ControllerState, active: jax.Array
    ) -> jax.Array:
        """[] int32: forwards of its own that a drafter who heeds limits may make in this round."""
        left = _mean(state.budget, active) - self._least_loss(drafter)
        most = jnp.clip(left / jnp.maximum(self._rounds_of(1.0), 1e-6), 1, drafter.num_nodes)
        most = most.astype(jnp.int32)
        return jnp.where(jnp.asarray(self.fixed) < 0, most, jnp.iinfo(jnp.int32).max)

    def _losses(self) -> jax.Array:
        """[K] float32: plain rounds that a round of each width loses if nothing is accepted; what
        the drafter's own forwards take comes to it."""
        assert self.costs is not None
        costs = jnp.asarray(self.costs, jnp.float32)
        return costs[1:] / costs[0] - 1

    def _rounds_of(self, forwards: jax.Array | float) -> jax.Array:
        """Plain rounds that so many forwards of the drafter's own take. [] float32."""
        assert self.costs is not None
        cost = jnp.asarray(self.draft_cost, jnp.float32)
        return forwards * cost / jnp.asarray(self.costs, jnp.float32)[0]

    def _least_loss(self, drafter: Drafter) -> jax.Array:
        """[] float32: that of the narrowest width with a draft."""
        widths = self.widths_of(drafter)
        return self._losses()[1 if widths[0] == 1 and len(widths) > 1 else 0]

    def _loss_of_a_try(self, drafter: Drafter) -> jax.Array:
        """[] float32: the same with the fewest forwards of the drafter's own."""
        forwards = 1.0 if drafter.heeds_limits else self.draft_forwards
        return self._least_loss(drafter) + self._rounds_of(forwards)

    def choose(
        self,
        drafter: Drafter,
        state: ControllerState,
        proposal: Proposal,
        active: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """What is judged of a proposal's tree.

        Returns:
          The choice as an index of `costs`, from 1, and the nodes [B, W] int32 of every row, those
          that are most likely to be accepted first.
        """
        assert self.costs is not None
        reach = self.reach(state, proposal, drafter.depth)
        # The root comes first. A parent is likelier than its child, a sibling than the next one.
        reach = reach.at[:, 0].set(1.0)
        if drafter.is_chain or proposal.tree.is_shape_drawn:
            nodes = jnp.broadcast_to(jnp.arange(reach.shape[1], dtype=jnp.int32)[None], reach.shape)
        else:
            order = jnp.argsort(reach, axis=1, descending=True, stable=True)
            nodes, reach = order.astype(jnp.int32), jnp.take_along_axis(reach, order, axis=1)
        tokens = jnp.where(active[:, None], jnp.cumsum(reach, axis=1), 0).sum(axis=0)  # [W]
        widths, losses = jnp.array(self.widths_of(drafter)), self._losses()
        losses += self._rounds_of(_most(proposal.cost, active))
        speed = tokens[widths - 1] / (1 + losses)
        is_covered = losses <= _mean(state.budget, active)
        best = 1 + jnp.argmax(jnp.where(is_covered, speed, 0)).astype(jnp.int32)
        return jnp.where(jnp.asarray(self.fixed) > 0, self.fixed, best), nodes

    def reach(self, state: ControllerState, proposal: Proposal, depth: int) -> jax.Array:
        """[B, W] float32: how likely each node is accepted; 0 if it does not exist."""
        tree = proposal.tree.as_known()
        rows, grade = jnp.arange(len(state.hits)), 0 if proposal.grade is None else proposal.grade
        hits, tries = state.hits[rows, grade], state.tries[rows, grade]  # [B, J, R]
        R = hits.shape[2]
        rank = jnp.arange(R, dtype=jnp.float32)
        sure = (jnp.asarray(grade, jnp.float32) + 1) / (state.hits.shape[1] + 1)
        prior = (self.prior + (self.surest - self.prior) * sure).reshape(-1, 1)  # [B or 1, 1]

        def below(
            above: jax.Array, level: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            rate = (level[0] + self.weight * above) / (level[1] + self.weight)
            return rate, rate

        start = jnp.broadcast_to(prior * (1 - prior) ** rank[None], (len(hits), R))
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
        proposal: Proposal,
        nodes: jax.Array,
        walk: Walk,
        active: jax.Array,
    ) -> ControllerState:
        """The state after a round.

        Args:
          drafter: of the method.
          state: before it.
          choice: [] int32. What was chosen, as an index of `costs`.
          proposal: of the drafter; only a root if nobody was asked.
          nodes: [B, n] int32. Those of its tree that were judged.
          walk: through them, which counts only them.
          active: [B] bool. Rows that took part.
        """
        assert self.costs is not None
        hits, tries = self.memory * state.hits, self.memory * state.tries
        tree, W = proposal.tree.as_known(), drafter.num_nodes
        if W > 1:
            path = jnp.take_along_axis(nodes, walk.path, axis=1)
            is_kept = jnp.arange(path.shape[1])[None] <= walk.num_accepted[:, None]
            is_on = (path[..., None] == jnp.arange(W)[None, None]) & is_kept[..., None]
            is_right = is_on.any(axis=1)  # [B, W]
            parent = jnp.maximum(tree.parents, 0)
            is_tried = jnp.take_along_axis(is_right, parent, axis=1) & tree.counts
            is_tried &= (tree.depths > 0) & active[:, None]
            # The path ends before a token that the target chose: unjudged nodes may have it, too.
            is_judged = (nodes[..., None] == jnp.arange(W)[None, None]).any(axis=1)
            is_next = tree.is_valid & (proposal.tree.parents == path[:, -1:])
            is_right |= is_next & ~is_judged & (tree.tokens == walk.bonus[:, None])
            B, _, J, R = hits.shape
            grade = 0 if proposal.grade is None else proposal.grade[:, None]
            cell = _cells(tree, R) + J * R * grade

            def add(to: jax.Array, what: jax.Array) -> jax.Array:
                flat = to.reshape(B, -1)
                flat = flat.at[jnp.arange(B)[:, None], cell].add(what.astype(to.dtype))
                return flat.reshape(to.shape)

            hits, tries = add(hits, is_tried & is_right), add(tries, is_tried)
        lost = jnp.pad(self._losses(), (1, 0))[choice]
        lost += self._rounds_of(_most(proposal.cost, active))
        saved = walk.num_accepted - lost
        dearest = jnp.maximum(drafter.depth, self.draft_forwards)
        most = jnp.maximum(self.savings, self._losses().max() + self._rounds_of(dearest))
        budget = jnp.minimum(state.budget + saved + self.tolerance, most)
        rounds = state.rounds.at[:, choice].add(1)
        return of_rows(active, ControllerState(hits, tries, budget, rounds), state)


def _mean(budget: jax.Array, active: jax.Array) -> jax.Array:
    """[] float32: over the rows that are active. A little more, as sums are rounded."""
    return jnp.where(active, budget, 0).sum() / jnp.maximum(active.sum(), 1) + 1e-4


def _most(cost: jax.Array, active: jax.Array) -> jax.Array:
    """[] int32: forwards of a batch, of those of its rows [B] that are active."""
    return jnp.where(active, cost, 0).max()


def _cells(tree: DraftTree, ranks: int) -> jax.Array:
    """[B, W] int32: a node's number among depths and ranks; the root has the first child's."""
    rank = jnp.minimum(tree.ranks(), ranks - 1) if ranks > 1 else 0
    return jnp.maximum(tree.depths - 1, 0) * ranks + rank
