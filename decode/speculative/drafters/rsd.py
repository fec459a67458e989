"""Recursive speculative decoding: drawn trees whose siblings, or beams, are all different.

Reference: Jeon et al., "Recursive Speculative Decoding: Accelerating LLM Inference via Sampling
Without Replacement", arXiv:2402.14160. Trees are drawn without replacement, and
`SpeculativeSampling`, whose recursive rejection is theirs, or `TraversalVerification` judges them.

    RSD-C   every node of a level has as many children, the first ones of Gumbel top-k:
            `DraftModelTree(..., shape=branching(3, 2, 1), is_sampled=True)`
    RSD-S   every level has as many nodes, by stochastic beam search: `DraftModelBeam`

Of a beam with log-probability phi and perturbed G (the root's are 0) and a token y,

    phi_y = phi + log q(y),  t_y = phi_y + Gumbel(0),  Z = max t
    v_y = G - t_y + log(1 - exp(t_y - Z))
    G_y = G - max(v_y, 0) - log(1 + exp(-|v_y|))        Gumbels whose maximum is G

and the `width` largest G_y of all beams are the next level (Kool et al., "Stochastic Beams and
Where to Find Them", arXiv:1903.06059). Siblings are tested from the largest G on: given those
before it, how large the next one's is says nothing about which token it is, so that it may be cut.

Letters: B rows, W nodes, n beams, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.streams import fold_in
from decode.speculative.contracts import Context, Proposal, spent
from decode.speculative.drafters.expansion import gumbel
from decode.speculative.drafters.smaller_model import DraftState, SmallerModel
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig
from dlm.params import Params

Score = Callable[[jax.Array, jax.Array, tuple[int, ...], tuple[int, ...]], jax.Array]


def beams(width: int, levels: int, context: Context, score: Score, is_sampled: bool) -> DraftTree:
    """A tree of `width` nodes per level, 1 + `levels` `width` of them; of a level, best first.

    Args:
      width: at least 1, at most V.
      levels: at least 1.
      context: the root, the distribution, and the randomness.
      score: of nodes' tokens [B, E] and parents [B, E] (the root's: -1), the depth of each, and
        some of them: logits [B, n, V] of what comes after those.
      is_sampled: whether they are drawn without replacement from the filtered distribution; else,
        and of greedy texts, they are the most probable beams.
    """
    root, is_drawn = context.root, is_sampled and context.sampling.temperature is not None
    probs_of = context.sampling.replace(repetition_penalty=None).probs
    B, W = len(root), 1 + width * levels
    depths = (0, *(1 + i // width for i in range(W - 1)))
    tokens = jnp.zeros((B, W), jnp.int32).at[:, 0].set(root)
    parents = jnp.full((B, W), -1, jnp.int32)
    is_valid = jnp.ones((B, W), bool)
    probs = None
    nodes: tuple[int, ...] = (0,)
    phi = noisy = jnp.zeros((B, 1))  # of the beams: G = phi where nothing is drawn
    for level in range(levels):
        known = nodes[-1] + 1
        logits = score(tokens[:, :known], parents[:, :known], depths[:known], nodes)
        if is_drawn:
            law = probs_of(logits)
            if probs is None:
                probs = jnp.zeros((B, W, law.shape[-1]), law.dtype)
            probs = probs.at[:, jnp.array(nodes)].set(law)
            below = phi[..., None] + jnp.log(law)
            key = fold_in(context.key, level)
            ranked = conditioned(below + gumbel(key, below.shape[1:]), noisy)
        else:
            below = phi[..., None] + jax.nn.log_softmax(logits)
            ranked = below
        exists = is_valid[:, jnp.array(nodes), None]
        ranked = jnp.where(exists, ranked, -jnp.inf)
        best, ids = jax.lax.top_k(ranked, width)  # [B, n, width]
        flat = lambda x: x.reshape(B, -1)  # noqa: E731
        noisy, chosen = jax.lax.top_k(flat(best), width)
        of = lambda x: jnp.take_along_axis(flat(x), chosen, axis=1)  # noqa: E731,B023
        phi = of(jnp.take_along_axis(jnp.where(exists, below, -jnp.inf), ids, axis=2))
        first = 1 + level * width
        above = jnp.array(nodes, jnp.int32)[chosen // width]
        nodes = tuple(range(first, first + width))
        put = slice(first, first + width)
        tokens = tokens.at[:, put].set(of(ids).astype(jnp.int32))
        parents = parents.at[:, put].set(above)
        is_valid = is_valid.at[:, put].set(noisy > -jnp.inf)
    return DraftTree(
        tokens=tokens,
        parents=parents,
        depths=jnp.broadcast_to(jnp.array(depths, jnp.int32)[None], (B, W)),
        is_valid=is_valid,
        probs=probs,
        drawn="without" if is_drawn else "none",
        is_shape_drawn=is_drawn and width > 1,
    )


def conditioned(noisy: jax.Array, most: jax.Array) -> jax.Array:
    """Perturbed log-probabilities [..., V] as if their maximum had come out as `most` [...]."""
    most = most[..., None]
    gap = noisy.max(axis=-1, keepdims=True) - noisy
    log_rest = jnp.where(gap < 0.7, jnp.log(-jnp.expm1(-gap)), jnp.log1p(-jnp.exp(-gap)))
    v = most - noisy + log_rest
    return most - jnp.maximum(v, 0) - jnp.log1p(jnp.exp(-jnp.abs(v)))


@struct.dataclass
class DraftModelBeam(SmallerModel):
    """Beams of a smaller model, drawn without replacement (RSD-S); or the most probable ones.

    Which nodes have children depends on what was drawn. So a controller judges the first levels of
    drawn beams, and of the last of these the first nodes: the beams of a smaller width.

    Attributes:
      width: >= 1, nodes per level. Static.
      levels: >= 1, levels below the root, and forwards of the draft model. Static.
    """

    width: int = struct.field(pytree_node=False, default=4)
    levels: int = struct.field(pytree_node=False, default=4)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(params, cfg, width=3, levels=2, layers=(0,))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        for name in ("width", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width > cfg.vocab_size:
            raise ValueError(
                f"width={self.width} must be at most vocab_size={cfg.vocab_size}: beams are "
                "different from the first level on"
            )

    @property
    def is_chain(self) -> bool:
        return self.width == 1

    @property
    def num_nodes(self) -> int:
        return 1 + self.width * self.levels

    @property
    def depth(self) -> int:
        return self.levels

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        state, forwards = self._catch_up(context, state)
        score = functools.partial(self._behind_some, cfg, context, state.cache)
        tree = beams(self.width, self.levels, context, score, self.is_sampled)
        return Proposal(tree, spent(context, self.levels) + forwards, state)
