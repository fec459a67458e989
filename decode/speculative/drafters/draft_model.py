"""A smaller model drafts, token by token or as a tree.

References: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding",
arXiv:2211.17192; Chen et al., "Accelerating Large Language Model Decoding with Speculative
Sampling", arXiv:2302.01318; trees: Miao et al. (SpecInfer), arXiv:2305.09781, and Chen et al.
(Sequoia), arXiv:2402.12374.

The draft model reads what the target reads, with a cache of its own.

Letters: B rows, S slots, W nodes, J depth, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import draw
from decode.core.streams import fold_in
from decode.speculative.contracts import Context, Proposal, Seen, spent
from decode.speculative.drafters.expansion import BestTree, expand, expand_best
from decode.speculative.drafters.smaller_model import DraftState, SmallerModel
from decode.speculative.tree import TreeShape, chain, check_shape
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Params
from dlm.window import Slots, Window


@struct.dataclass
class DraftModel(SmallerModel):
    """A chain of a smaller model's tokens, one forward per token; most probable or drawn.

    One forward more reads the last draft, which the next round needs if all were accepted and a
    token of the target's was put behind them.

    Attributes:
      num_drafts: >= 1, tokens per round. Static.
    """

    num_drafts: int = struct.field(pytree_node=False, default=4)

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if self.num_drafts < 1:
            raise ValueError(f"num_drafts={self.num_drafts} must be at least 1")

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        num = self.num_drafts if context.is_ahead else self.num_nodes
        cost = spent(context, num)
        if context.may_pause:  # or else all but the last draft was read by the round before
            state, forwards = self._catch_up(context, state)
            cost += forwards
        is_drawn = self.is_sampled and context.sampling.temperature is not None
        extra = range(cfg.vocab_size, self.draft.vocab_size)
        padding = jnp.array(extra, jnp.int32) if extra else None

        def draft(carry: tuple[jax.Array, KVCache], i: jax.Array) -> Any:
            token, cache = carry
            at = context.length - 1 + i
            window, slots = Window.at(token[:, None], at), Slots.append(cache, at, context.active)
            output = self._forward(context, window, slots)
            hidden = output.hidden[:, 0]
            if is_drawn:
                drawn_from = context.sampling.replace(repetition_penalty=None).probs(
                    self._logits(cfg, hidden)
                )
                following = draw(fold_in(context.key, i), drawn_from)
                return (following, output.cache), (token, drawn_from)
            following = vocab.read(vocab.head(self.params), hidden, banned_ids=padding).token
            return (following, output.cache), (token, None)

        start = (context.root, state.cache)
        (last, cache), (tokens, probs) = jax.lax.scan(draft, start, jnp.arange(num))
        if context.is_ahead:  # nothing was drawn behind the last draft
            tokens = jnp.concatenate([tokens, last[None]])
            probs = None if probs is None else jnp.pad(probs, ((0, 1), (0, 0), (0, 0)))
        probs = None if probs is None else probs.swapaxes(0, 1)
        tree = chain(self.num_drafts).tree(tokens.T, probs=probs)
        known = jnp.where(context.active, context.length - 1 + num, state.known)
        return Proposal(tree, cost, DraftState(cache, known))

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: DraftState
    ) -> DraftState:
        """Drafts that were not kept are not known."""
        return state.replace(known=jnp.minimum(state.known, seen.start + seen.count))


@struct.dataclass
class DraftModelTree(SmallerModel):
    """A tree of one shape, one forward of a smaller model per level; siblings may be drawn.

    Drafts of a node are its most probable tokens, or drawn without replacement. Every forward runs
    the whole tree: nothing is written to the cache before it is accepted, by the next round.

    Attributes:
      shape: of the tree. Static.
    """

    shape: TreeShape = struct.field(pytree_node=False, default=chain(4))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        check_shape(self.shape, cfg.vocab_size)

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        state, forwards = self._catch_up(context, state)

        def score(tokens: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
            return self._behind(cfg, context, state.cache, self.shape.tree(tokens), nodes)

        return Proposal(
            expand(self.shape, context, score, self.is_sampled),
            spent(context, self.shape.depth) + forwards,
            state,
        )


@struct.dataclass
class DraftModelBest(BestTree, SmallerModel):
    """The most probable tree of a smaller model, another one in every round.

    Reference: EAGLE-2, arXiv:2406.16858; see `expand_best`. Which nodes there are follows from the
    context alone, so any rule for drafts that were not drawn is exact.
    """

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(params, cfg, width=3, levels=3, budget=9, layers=(0,))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        self._check_not_sampled()

    @property
    def num_ids(self) -> int:
        return self.draft.vocab_size

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        state, forwards = self._catch_up(context, state)
        score = functools.partial(self._behind_some, cfg, context, state.cache)
        tree = expand_best(self.width, self.levels, self.budget, context, score)
        return Proposal(tree, spent(context, self.levels) + forwards, state)
