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

        path, step = [node], node
        for _ in range(depth):  # back to the root
            up = jnp.take_along_axis(tree.parents, step[:, None], axis=1)[:, 0]
            step = jnp.maximum(up, 0)
            path.append(step)
        backwards = jnp.stack(path, axis=1)  # [B, J + 1]
        # From the root down; `node` lies `num` steps below it.
        index = jnp.maximum(num[:, None] - jnp.arange(depth + 1)[None], 0)
        rows = jnp.arange(p.shape[0])
        behind, least = p[rows, node], limit[rows, node]
        behind = jnp.where(behind > least[:, None], behind, 0)
        best = jax.nn.one_hot(jnp.argmax(p[rows, node], axis=-1), p.shape[-1], dtype=p.dtype)
        behind = jnp.where(behind.any(axis=-1, keepdims=True), behind, best)
        bonus = draw(fold_in(verdict.key, Stream.BONUS), behind)
        return Walk(jnp.take_along_axis(backwards, index, axis=1), num, bonus)


def _normalise(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """[B, V] rows that sum to 1; those without anything become those of `otherwise`."""
    total = x.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), otherwise)
