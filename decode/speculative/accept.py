"""Which drafts are kept: walks down a judged draft tree.

Every rule ends a round with one token more than the drafts it accepted. All but `Typical` are
lossless: what is written follows the target's distribution as if nothing had been drafted, and with
temperature None it is the target's greedy text, token for token.

Letters: B rows, W nodes, J largest depth, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import Part
from decode.core.sampling import draw
from decode.core.streams import Stream, fold_in, uniforms
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig

if TYPE_CHECKING:
    from decode.speculative.loop import SpeculativeMethod


class Verdict(struct.PyTreeNode):
    """A draft tree, and what the target says after each of its nodes.

    Attributes:
      tree: the drafts.
      chosen: [B, W] int32. The token that the target itself puts after each node: its arg-max, or a
        draw from its distribution.
      probs: [B, W, V] float32, or None unless the rule has `needs_probs`. The target's distribution
        after each node, filtered as its text is to be.
      key: [B, 2] uint32. A random stream per row, used for nothing else.
    """

    tree: DraftTree
    chosen: jax.Array
    probs: jax.Array | None
    key: jax.Array


class Walk(struct.PyTreeNode):
    """The way a row went.

    Attributes:
      path: [B, J + 1] int32. Nodes from the root down, filled up with the last one.
      num_accepted: [B] int32. Nodes of it below the root.
      bonus: [B] int32. The token behind the last one.
    """

    path: jax.Array
    num_accepted: jax.Array
    bonus: jax.Array


@struct.dataclass
class AcceptanceRule(Part):
    """Which drafts are kept?

    Attributes:
      needs_probs: whether `Verdict.probs` must be there: [B, W, V] then lives in memory.
      is_lossless: whether the text follows the target's distribution.
    """

    needs_probs: ClassVar[bool] = False
    is_lossless: ClassVar[bool] = True

    def refuse(self, method: SpeculativeMethod) -> str | None:
        """Why the rule makes no sense beside the other choices of a method, or None."""
        return None

    def walk(self, verdict: Verdict, depth: int) -> Walk:
        """The way of every row; `depth` is J."""
        raise NotImplementedError


@struct.dataclass
class Match(AcceptanceRule):
    """For any drafter: down the tree as long as a child is what the target itself chose.

    Whatever was drafted, what is written are the target's own choices, so this is lossless for
    every tree; where drafts follow from the context (arg-max, top-k, n-grams) none is more likely
    to accept. Greedy verification with temperature None.
    """

    def walk(self, verdict: Verdict, depth: int) -> Walk:
        tree, chosen = verdict.tree, verdict.chosen
        node = jnp.zeros(chosen.shape[0], jnp.int32)
        path, num = [node], jnp.zeros_like(node)
        going = jnp.ones(chosen.shape[0], bool)
        for _ in range(depth):
            wanted = jnp.take_along_axis(chosen, node[:, None], axis=1)
            fits = (tree.parents == node[:, None]) & tree.is_valid & (tree.tokens == wanted)
            going &= fits.any(axis=1)
            node = jnp.where(going, jnp.argmax(fits, axis=1).astype(jnp.int32), node)
            path.append(node)
            num += going
        bonus = jnp.take_along_axis(chosen, node[:, None], axis=1)[:, 0]
        return Walk(jnp.stack(path, axis=1), num, bonus)


@struct.dataclass
class SpeculativeSampling(AcceptanceRule):
    """For drawn drafts: children are tested against what is left of the target's distribution.

    Reference: Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318, for chains;
    Miao et al. (SpecInfer), arXiv:2305.09781, and Chen et al. (Sequoia), arXiv:2402.12374, for
    siblings drawn with and without replacement. At a node with the target's distribution r and the
    draft's s, a child y is accepted with probability min(1, r(y) / s(y)); otherwise

        r <- norm(max(r - s, 0))        s(y) <- 0, s <- norm(s)    (without replacement)

    and if no child is accepted, the token behind is drawn from r. Drafts that were not drawn count
    as drawn from a distribution that is 1 at them.

    Which of the two holds for siblings, the tree says (`DraftTree.drawn`).
    """

    needs_probs: ClassVar[bool] = True

    def walk(self, verdict: Verdict, depth: int) -> Walk:
        tree, probs = verdict.tree, verdict.probs
        assert probs is not None
        B, W, V = probs.shape
        rows = jnp.arange(B)
        u = uniforms(fold_in(verdict.key, Stream.TEST), W)

        def test(v: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            node, r, s, path, num = carry
            token = tree.tokens[:, v]
            is_child = (tree.parents[:, v] == node) & tree.is_valid[:, v]
            q = s if tree.probs is not None else jax.nn.one_hot(token, V, dtype=r.dtype)
            # A token that its own distribution rules out was never drawn: nor is it accepted.
            accepts = is_child & (u[:, v] * q[rows, token] < r[rows, token])
            accepts &= q[rows, token] > 0
            rejects = is_child & ~accepts
            left = _normalise(jnp.maximum(r - q, 0), otherwise=r)
            r = jnp.where(rejects[:, None], left, r)
            if tree.drawn == "without":
                rest = _normalise(s.at[rows, token].set(0), otherwise=s)
                s = jnp.where(rejects[:, None], rest, s)
            node = jnp.where(accepts, v, node)
            num = num + accepts
            path = path.at[rows, jnp.where(accepts, num, depth + 1)].set(v, mode="drop")
            r = jnp.where(accepts[:, None], probs[:, v], r)
            if tree.probs is not None:
                s = jnp.where(accepts[:, None], tree.probs[:, v], s)
            return node, r, s, path, num

        zeros = jnp.zeros(B, jnp.int32)
        path = jnp.zeros((B, depth + 1), jnp.int32)
        s = tree.probs[:, 0] if tree.probs is not None else jnp.zeros((B, 0))
        start = (zeros, probs[:, 0], s, path, zeros)
        node, r, _, path, num = jax.lax.fori_loop(1, W, test, start)
        path = jnp.where(jnp.arange(depth + 1)[None] <= num[:, None], path, node[:, None])
        return Walk(path, num, draw(fold_in(verdict.key, Stream.BONUS), r))


@struct.dataclass
class BlockVerification(AcceptanceRule):
    """For drawn chains: judged as a whole, which accepts more than token by token.

    Reference: Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv:2403.10444.
    With P_0 = 1 and P_i = min(1, P_{i-1} p_i(X_i) / q_i(X_i)) for drafts X_1 .. X_g,

        h_i = S / (S + 1 - P_i),  S = sum_x max(P_i p_{i+1}(x) - q_{i+1}(x), 0)     i < g
        h_g = P_g

    the longest beginning with a uniform number below its h is accepted, and the token behind it
    is drawn from norm(max(P p - q, 0)), or from p behind the last draft.
    """

    needs_probs: ClassVar[bool] = True

    def refuse(self, method: SpeculativeMethod) -> str | None:
        if not method.drafter.is_chain:
            return "BlockVerification judges chains: use SpeculativeSampling with this drafter"
        return None

    def walk(self, verdict: Verdict, depth: int) -> Walk:
        tree, p = verdict.tree, verdict.probs
        assert p is not None
        B, W, V = p.shape
        if tree.probs is not None:
            q = tree.probs
        else:
            following = jnp.pad(tree.tokens[:, 1:], ((0, 0), (0, 1)))
            q = jax.nn.one_hot(following, V, dtype=p.dtype)
        num_drafts = tree.is_valid.sum(axis=1) - 1  # [B]: g
        u = uniforms(fold_in(verdict.key, Stream.TEST), W)
        rows = jnp.arange(B)
        reached = jnp.ones(B, p.dtype)  # P_i
        kept, num = reached, jnp.zeros(B, jnp.int32)
        for i in range(1, W):
            token = tree.tokens[:, i]
            # Never drawn: 0.
            ratio = jnp.where(
                q[rows, i - 1, token] > 0,
                p[rows, i - 1, token] / jnp.maximum(q[rows, i - 1, token], 1e-38),
                0,
            )
            reached = jnp.minimum(1, reached * ratio)
            surplus = jnp.maximum(reached[:, None] * p[:, i] - q[:, i], 0).sum(axis=1)
            total = surplus + 1 - reached
            h = jnp.where(total > 0, surplus / jnp.where(total > 0, total, 1), 0)
            h = jnp.where(i == num_drafts, reached, h)
            accepts = (i <= num_drafts) & (u[:, i] < h)
            num = jnp.where(accepts, i, num)
            kept = jnp.where(accepts, reached, kept)
        behind = p[rows, num]
        left = _normalise(jnp.maximum(kept[:, None] * behind - q[rows, num], 0), otherwise=behind)
        behind = jnp.where((num == num_drafts)[:, None], behind, left)
        path = jnp.minimum(jnp.arange(depth + 1, dtype=jnp.int32)[None], num[:, None])
        return Walk(path, num, draw(fold_in(verdict.key, Stream.BONUS), behind))


@struct.dataclass
class TraversalVerification(AcceptanceRule):
    """For trees, drawn or not: judged from the leaves up, which accepts more than from the root.

    Reference: Weng et al., "Traversal Verification for Speculative Tree Decoding",
    arXiv:2505.12398. Nodes are entered and left in the order of a depth-first walk. Each keeps the
    target's law r and the draft's s as far as they are left, and a weight w, 1 at the root. Where a
    child with token y is entered, w_child = min(1, w r(y) / s(y)). Where it is left it is accepted
    with probability w_child, and the walk ends; else of the node above

        S = sum max(w r - s, 0),  w <- S / (S + 1 - w),  r <- norm(max(w r - s, 0)) with the old w
        s(y) <- 0, s <- norm(s)                                  (without replacement)

    The root is always accepted. The token behind is drawn from r of the node that was accepted. Of
    a chain this is `BlockVerification`, for the same random numbers. Drafts that were not drawn
    count as drawn from a distribution that is 1 at them, one after the other.
    """

    needs_probs: ClassVar[bool] = True

    def walk(self, verdict: Verdict, depth: int) -> Walk:
        tree, probs = verdict.tree, verdict.probs
        assert probs is not None
        B, W, V = probs.shape
        rows = jnp.arange(B)
        u = uniforms(fold_in(verdict.key, Stream.TEST), W).at[:, 0].set(-1)
        node_at, is_left = _tour(tree, depth)

        def move(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            ended, num, w, r, s, r_end = carry  # of the nodes on the way: [B, J + 1], [.., V]
            v, leaves = node_at[:, i], is_left[:, i]
            goes_on = (ended < 0) & (v >= 0)
            d, token = tree.depths[rows, v], tree.tokens[rows, v]
            above = jnp.maximum(d - 1, 0)
            w_above, r_above, s_above = w[rows, above], r[rows, above], s[rows, above]
            q = s_above if tree.probs is not None else jax.nn.one_hot(token, V, dtype=r.dtype)
            # -- Entering: what its own distribution rules out was never drawn.
            of_token = q[rows, token]
            reached = w_above * r_above[rows, token] / jnp.where(of_token > 0, of_token, 1)
            enters = goes_on & ~leaves
            w_own = jnp.where(of_token > 0, jnp.minimum(1, reached), 0)
            w_own = jnp.where(v == 0, 1, w_own)
            # -- Leaving: accepted, or taken out of what is left of the node above.
            is_kept = goes_on & leaves & (u[rows, v] < w[rows, d])
            ended, num = jnp.where(is_kept, v, ended), jnp.where(is_kept, d, num)
            r_end = jnp.where(is_kept[:, None], r[rows, d], r_end)
            rejects = goes_on & leaves & ~is_kept
            left = jnp.maximum(w_above[:, None] * r_above - q, 0)
            total = left.sum(axis=1) + 1 - w_above
            share = jnp.where(total > 0, left.sum(axis=1) / jnp.where(total > 0, total, 1), 0)
            # -- Of one node per row something changes: of itself or of the one above.
            at = jnp.where(enters, d, jnp.where(rejects, above, depth + 1))
            w = w.at[rows, at].set(jnp.where(enters, w_own, share), mode="drop")
            new = jnp.where(enters[:, None], probs[rows, v], _normalise(left, otherwise=r_above))
            r = r.at[rows, at].set(new, mode="drop")
            if tree.probs is not None:
                rest = s_above
                if tree.drawn == "without":
                    rest = _normalise(s_above.at[rows, token].set(0), otherwise=s_above)
                new = jnp.where(enters[:, None], tree.probs[rows, v], rest)
                s = s.at[rows, at].set(new, mode="drop")
            return ended, num, w, r, s, r_end

        way = jnp.zeros((B, depth + 1, V), probs.dtype)
        none = jnp.full(B, -1, jnp.int32)
        start = (none, jnp.zeros_like(none), way[..., 0], way, way, probs[:, 0])
        if tree.probs is None:
            start = (*start[:4], way[:, :, :0], start[5])
        node, num, _, _, _, left = jax.lax.fori_loop(0, 2 * W, move, start)
        return Walk(
            path=_way_to(tree, node, num, depth),
            num_accepted=num,
            bonus=draw(fold_in(verdict.key, Stream.BONUS), left),
        )


@struct.dataclass
class Typical(AcceptanceRule):
    """Medusa's typical acceptance: what is probable enough stays. **Lossy.**

    Reference: Cai et al., "Medusa", arXiv:2401.10774, Sec. 2.3.1, and the public code. With the
    target's distribution p after a node and its entropy H (of log(p + 1e-5), as there), a child x
    is acceptable if

        p(x) > min(epsilon, delta exp(-H))

    The longest path of acceptable nodes is taken, among equals the most probable one; the token
    behind it is drawn from p without the tokens that are not acceptable.

    Attributes:
      epsilon: in [0, 1].
      delta: at least 0.
    """

    needs_probs: ClassVar[bool] = True
    is_lossless: ClassVar[bool] = False

    epsilon: jax.Array | float = 0.09
    delta: jax.Array | float = 0.3

    def validate(self, cfg: ModelConfig) -> None:
        if not 0 <= float(self.epsilon) <= 1:
            raise ValueError(f"epsilon={float(self.epsilon):g} must be in [0, 1]")
        if not float(self.delta) >= 0:
            raise ValueError(f"delta={float(self.delta):g} must be at least 0")

    def walk(self, verdict: Verdict, depth: int) -> Walk:
        tree, p = verdict.tree, verdict.probs
        assert p is not None
        entropy = -(p * jnp.log(p + 1e-5)).sum(axis=-1)  # [B, W]
        limit = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        above = jnp.maximum(tree.parents, 0)
        of_token = jnp.take_along_axis(
            jnp.take_along_axis(p, above[..., None], axis=1), tree.tokens[..., None], axis=2
        )[..., 0]
        is_typical = tree.is_valid & (of_token > jnp.take_along_axis(limit, above, axis=1))
        is_typical = is_typical.at[:, 0].set(True)
        log_p = jnp.log(of_token).at[:, 0].set(0.0)
        # Of a node: all above it are acceptable, and the log-probability of the way to it.
        is_open, score, step = is_typical, log_p, tree.parents
        for _ in range(depth):
            up = jnp.maximum(step, 0)
            is_open &= jnp.take_along_axis(is_typical, up, axis=1) | (step < 0)
            score += jnp.where(step > 0, jnp.take_along_axis(log_p, up, axis=1), 0)
            step = jnp.where(step > 0, jnp.take_along_axis(tree.parents, up, axis=1), -1)
        reach = jnp.where(is_open, tree.depths, -1)
        num = reach.max(axis=1)
        is_longest = reach == num[:, None]
        node = jnp.argmax(jnp.where(is_longest, score, -jnp.inf), axis=1).astype(jnp.int32)
        rows = jnp.arange(p.shape[0])
        behind, least = p[rows, node], limit[rows, node]
        behind = jnp.where(behind > least[:, None], behind, 0)
        best = jax.nn.one_hot(jnp.argmax(p[rows, node], axis=-1), p.shape[-1], dtype=p.dtype)
        behind = jnp.where(behind.any(axis=-1, keepdims=True), behind, best)
        bonus = draw(fold_in(verdict.key, Stream.BONUS), behind)
        return Walk(_way_to(tree, node, num, depth), num, bonus)


def _tour(tree: DraftTree, depth: int) -> tuple[jax.Array, jax.Array]:
    """The order in which a depth-first walk enters and leaves the nodes of a tree.

    A node is entered in moment 2 p - d, of its number p in the order of entering and its depth d,
    and left when all below it are: another 2 n - 1 moments later, of n nodes with itself.

    Returns:
      [B, 2 W] int32, the node, -1 behind the last moment, and [B, 2 W] bool: whether it is left.
    """
    B, W = tree.tokens.shape
    above = tree.ancestors(depth) & tree.is_valid[:, :, None] & tree.is_valid[:, None]
    num = above.sum(axis=1)  # [B, W]: nodes below each, and itself
    is_before = jnp.arange(W)[None, :, None] > jnp.arange(W)[None, None]
    is_before &= tree.parents[:, :, None] == tree.parents[:, None]
    before = jnp.where(is_before, num[:, None], 0).sum(axis=2)  # below siblings before it
    place = jnp.where(above, 1 + before[:, None], 0).sum(axis=2) - 1
    enters = jnp.where(tree.is_valid, 2 * place - tree.depths, 2 * W)
    leaves = jnp.where(tree.is_valid, enters + 2 * num - 1, 2 * W)
    rows, nodes = jnp.arange(B)[:, None], jnp.arange(W, dtype=jnp.int32)[None]
    none = jnp.full((B, 2 * W), -1, jnp.int32)
    node_at = none.at[rows, enters].set(nodes, mode="drop").at[rows, leaves].set(nodes, mode="drop")
    return node_at, (none == 0).at[rows, leaves].set(True, mode="drop")


def _way_to(tree: DraftTree, node: jax.Array, num: jax.Array, depth: int) -> jax.Array:
    """[B, J + 1] int32: the way from the root to nodes [B] that lie `num` [B] steps below it."""
    path, step = [node], node
    for _ in range(depth):  # back to the root
        up = jnp.take_along_axis(tree.parents, step[:, None], axis=1)[:, 0]
        step = jnp.maximum(up, 0)
        path.append(step)
    index = jnp.maximum(num[:, None] - jnp.arange(depth + 1)[None], 0)
    return jnp.take_along_axis(jnp.stack(path, axis=1), index, axis=1)


def _normalise(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """[B, V] rows that sum to 1; those without anything become those of `otherwise`."""
    total = x.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), otherwise)
