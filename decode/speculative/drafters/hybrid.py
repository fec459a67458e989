"""Two drafters: one that is asked first, and another for rows of which it is not sure enough.

Reference: Hu et al., "SAM Decoding", arXiv:2411.10666, Sec. 3.4, where a match of five tokens is
enough, and Oliaro et al., "SuffixDecoding", arXiv:2411.04975, Sec. 4: what is copied from texts is
free and often long, but only now and then there; a model always has something to say.

How sure the first one is, it says by `Proposal.grade`. The second is asked only in rounds in which
some row wants it, and is told of all others what it is told of rounds in which a controller asks
nobody (`Context.may_pause`, `Drafter.pause`). If it reads rows of its own beside the tree
(`Drafter.num_extra`), it is always asked.

Letters: B rows, W nodes, J depth, T positions seen at once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import check_numbers
from decode.core.loop import in_place, of_rows
from decode.speculative.contracts import Context, Drafter, Proposal, Seen, no_proposal
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.prompt_lookup import PromptLookup
from decode.speculative.drafters.sam import SAM
from decode.speculative.drafters.token_recycling import TokenRecycling
from decode.speculative.tree import DraftTree
from dlm.config import ModelConfig
from dlm.params import Params

if TYPE_CHECKING:
    from decode.speculative.loop import SpeculativeMethod


class HybridState(struct.PyTreeNode):
    """What both remember.

    Attributes:
      first, second: states of theirs.
      is_first: [B] bool. Whose tree the last one was.
    """

    first: Any
    second: Any
    is_first: jax.Array


@struct.dataclass
class Hybrid(Drafter):
    """The tree of one drafter where it is sure enough, else that of another.

    Attributes:
      first: who is asked first; without rows of its own.
      second: who drafts where `first` has nothing, or nothing of which it is sure.
      threshold: >= 0. The lowest grade of a proposal of `first` that is taken; as many as it has
        (`num_grades`): none is.
    """

    notices_pauses: ClassVar[bool] = True

    first: Drafter
    second: Drafter
    threshold: jax.Array | int = 0

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"sam_recycling": cls(SAM(), TokenRecycling(), 4)}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(PromptLookup(num_drafts=6), DraftModel.example(cfg, params), 1)

    def validate(self, cfg: ModelConfig) -> None:
        for name in ("first", "second"):
            if not isinstance(part := getattr(self, name), Drafter):
                raise ValueError(f"{name}={part!r} must be of class Drafter")
            check_numbers(part)
            part.validate(cfg)
        if not 0 <= int(self.threshold) <= self.first.num_grades:
            raise ValueError(
                f"threshold={int(self.threshold)} must be in [0, {self.first.num_grades}], as many "
                f"grades as there are of first={type(self.first).__name__}"
            )

    def refuse(self, method: SpeculativeMethod) -> str | None:
        first, second = self.first, self.second
        for part in (first, second):
            if reason := part.refuse(method.replace(drafter=part)):
                return reason
        if first.num_extra:
            name = type(first).__name__
            return f"first={name} reads rows of its own beside its tree: give it as second"
        layers = {part.feature_layers for part in (first, second)} - {()}
        if len(layers) > 1:
            return (
                f"first reads layers {first.feature_layers} of the target and second "
                f"{second.feature_layers}: they must be the same, or one read none"
            )
        if first.draws:
            name = type(first).__name__
            return f"first={name} draws its drafts: what is drawn must be given as second"
        if second.draws and not first.is_chain:
            name = type(second).__name__
            return f"second={name} draws its drafts, beside which first must draft a chain"
        return None

    @property
    def num_nodes(self) -> int:
        return max(self.first.num_nodes, self.second.num_nodes)

    @property
    def depth(self) -> int:
        return max(self.first.depth, self.second.depth)

    @property
    def is_chain(self) -> bool:
        return self.first.is_chain and self.second.is_chain

    @property
    def draws(self) -> bool:
        return self.second.draws

    @property
    def needs_probs(self) -> bool:
        return self.first.needs_probs or self.second.needs_probs

    @property
    def num_extra(self) -> int:
        return self.second.num_extra

    def num_extra_beside(self, num_nodes: int) -> int:
        return self.second.num_extra_beside(min(num_nodes, self.second.num_nodes))

    def params_of_extra(self, params: Params, num_nodes: int) -> Params:
        return self.second.params_of_extra(params, num_nodes)

    @property
    def num_grades(self) -> int:
        """Those of the second, and above them those of the first."""
        return self.first.num_grades + self.second.num_grades

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.first.feature_layers or self.second.feature_layers

    @property
    def num_best(self) -> int:
        return max(self.first.num_best, self.second.num_best)

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> HybridState:
        first, second = (
            part.init(cfg, batch_size, num_slots) for part in (self.first, self.second)
        )
        return HybridState(first, second, jnp.zeros(batch_size, bool))

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: HybridState
    ) -> HybridState:
        return state.replace(
            first=self.first.prefill(cfg, context, seen, state.first),
            second=self.second.prefill(cfg, context, seen, state.second),
        )

    def keep(
        self, cfg: ModelConfig, state: HybridState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[HybridState, jax.Array]:
        first, known = self.first.keep(cfg, state.first, length, num_kept)
        second, also_known = self.second.keep(cfg, state.second, length, num_kept)
        return state.replace(first=first, second=second), jnp.minimum(known, also_known)

    def propose(self, cfg: ModelConfig, context: Context, state: HybridState) -> Proposal:
        one = self.first.propose(cfg, context, state.first)
        no_grade = jnp.zeros_like(context.length)
        grade = no_grade if one.grade is None else one.grade
        is_first = one.tree.is_valid[:, 1:].any(axis=1) & (grade >= self.threshold)
        rest = context.active & ~is_first
        cache = context.cache if one.cache is None else one.cache
        asked = context.replace(active=rest, may_pause=True, cache=cache)

        def ask(nothing: Proposal) -> Proposal:
            cache = asked.cache if nothing.cache is None else nothing.cache
            return self.second.propose(cfg, asked.replace(cache=cache), nothing.state)

        whole = lambda: self.second.propose(cfg, asked, state.second)  # noqa: E731
        if self.second.num_extra:
            other = whole()
        else:
            other = in_place(rest.any(), ask, no_proposal(whole, asked, state.second))
        other_grade = no_grade if other.grade is None else other.grade
        extra = other.extra
        if extra is not None:  # which know of no further nodes
            W = self.second.num_nodes
            behind = jnp.pad(extra.sees[..., :W], ((0, 0), (0, 0), (0, self.num_nodes - W)))
            extra = extra.replace(sees=jnp.concatenate([behind, extra.sees[..., W:]], axis=2))
        return Proposal(
            tree=self._choose(is_first, one.tree, other.tree),
            cost=one.cost + jnp.where(rest, other.cost, 0),
            state=HybridState(one.state, other.state, is_first),
            extra=extra,
            grade=jnp.where(is_first, grade + self.second.num_grades, other_grade),
            cache=one.cache if other.cache is None else other.cache,
        )

    def _choose(self, is_first: jax.Array, one: DraftTree, other: DraftTree) -> DraftTree:
        """One of two trees in every row."""
        if other.probs is not None:  # what was not drawn is as if drawn from where it is certain
            following = jnp.pad(one.tokens[:, 1:], ((0, 0), (0, 1)))
            one = one.replace(
                probs=jax.nn.one_hot(following, other.probs.shape[-1], dtype=other.probs.dtype),
                drawn=other.drawn,
                is_shape_drawn=other.is_shape_drawn,
            )

        one, other = (_widen(tree, self.num_nodes, self.is_chain) for tree in (one, other))
        return of_rows(is_first, one, other)

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: HybridState
    ) -> HybridState:
        is_first, see = state.is_first, functools.partial(_see, cfg, context, seen)
        return state.replace(
            first=see(self.first, state.first, is_first),
            second=see(self.second, state.second, ~is_first),
        )

    def pause(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: HybridState
    ) -> HybridState:
        see = functools.partial(_see, cfg, context, seen)
        return state.replace(
            first=see(self.first, state.first, None),
            second=see(self.second, state.second, None),
        )


def _see(
    cfg: ModelConfig,
    context: Context,
    seen: Seen,
    part: Drafter,
    state: Any,
    is_own: jax.Array | None,
) -> Any:
    """The state of a part after a round.

    Rows `is_own` [B] bool had its tree judged; None: nobody was asked.
    """
    if seen.best is not None:
        seen = seen.replace(best=seen.best[..., : part.num_best])
    if not part.notices_pauses:
        return part.observe(cfg, context, seen, state)
    # -- In pieces as long as those that it sees of its own trees, of which there is one.
    num, T = part.depth + 1, seen.tokens.shape[1]
    place = jnp.where(jnp.arange(T)[None] < seen.count[:, None], jnp.arange(T)[None], T)
    slot = jnp.where(place < T, seen.start[:, None] + place, context.tokens.shape[1])
    rows = jnp.arange(len(slot))[:, None]
    written = context.tokens.at[rows, slot].set(seen.tokens, mode="drop")
    for i in range(0, T, num):
        piece = _piece(seen, i, num)
        there = context.active & (piece.count > 0)
        others = there if is_own is None else there & ~is_own
        now = context.replace(tokens=written, length=piece.start + 1, active=others)
        state = part.pause(cfg, now, piece, state)
        if i == 0 and is_own is not None:
            state = part.observe(cfg, context.replace(active=there & is_own), piece, state)
    return state


def _piece(seen: Seen, first: int, num: int) -> Seen:
    """So many positions of those seen, from one on."""

    def cut(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = x[:, first : first + num]
        return jnp.pad(x, ((0, 0), (0, num - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))

    return seen.replace(
        tokens=cut(seen.tokens),
        hidden=cut(seen.hidden),
        features=cut(seen.features),
        start=seen.start + first,
        count=jnp.clip(seen.count - first, 0, num),
    )


def _widen(tree: DraftTree, num_nodes: int, is_chain: bool) -> DraftTree:
    """The tree with nodes that do not exist behind its own."""
    W = tree.tokens.shape[1]
    new = jnp.arange(W, num_nodes, dtype=jnp.int32)
    behind = ((0, 0), (0, len(new)))

    def add(x: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.broadcast_to(values[None], (len(x), len(new)))], axis=1)

    return tree.replace(
        tokens=jnp.pad(tree.tokens, behind),
        parents=add(tree.parents, new - 1 if is_chain else jnp.zeros_like(new)),
        depths=add(tree.depths, new if is_chain else jnp.ones_like(new)),
        is_valid=jnp.pad(tree.is_valid, behind),
        probs=None if tree.probs is None else jnp.pad(tree.probs, (*behind, (0, 0))),
    )
