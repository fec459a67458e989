"""What drafters that run a smaller model share: its cache, and reading with it.

Letters: B rows, S slots, W nodes, J depth, T tokens read at once, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.loop import in_place
from decode.speculative.contracts import Context, Drafter, Proposal, Seen, no_proposal
from decode.speculative.tree import DraftTree
from dlm import vocab
from dlm.cache import KVCache, init_cache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.models.decoder import check_layers
from dlm.params import Params
from dlm.window import Slots, Window
from kernels_pallas.window_attention import pack_mask

# Published models of one tokenizer pad their embeddings differently: Qwen2.5's have 151,936 or
# 152,064 rows. What only one of two models has is padding.
MAX_PADDING = 1024


class DraftState(struct.PyTreeNode):
    """What the draft model has read.

    Attributes:
      cache: of the draft model, a slot per position.
      known: [B] int32. How many positions from the first one on it has read, of what was kept.
    """

    cache: KVCache
    known: jax.Array


@struct.dataclass
class SmallerModel(Drafter):
    """What all drafters that run a smaller model share.

    What was written in rounds without drafts is read when drafts are asked for again. Texts that
    outgrow the draft model's context length go on without drafts and without its forwards. Both
    models must have the same tokens, up to padding: `dlm.check_same_tokens(draft, target)`.

    Attributes:
      params: of the draft model.
      draft: the draft model. Static.
      is_sampled: whether drafts are drawn from the draft's distribution (filtered as the target's,
        but for the repetition penalty), which wants `SpeculativeSampling` or `BlockVerification`;
        else they are its most probable tokens. Static.
      layers: of it that are run, see `dlm.models.decoder.forward`; None: all. Static.
    """

    reads_text: ClassVar[bool] = True

    params: Params
    draft: ModelConfig = struct.field(pytree_node=False)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    layers: tuple[int, ...] | None = struct.field(pytree_node=False, default=None, kw_only=True)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        """The first layer of the target."""
        return cls(params, cfg, layers=(0,))

    def validate(self, cfg: ModelConfig) -> None:
        if not isinstance(self.draft, ModelConfig) or not isinstance(self.params, Mapping):
            raise ValueError(
                f"draft is a {type(self.draft).__name__}, which must be a ModelConfig, and params "
                f"a {type(self.params).__name__}, which must be its parameters: "
                f"{type(self).__name__}(lm.params, lm.cfg)"
            )
        if self.layers is not None and not isinstance(self.layers, Sequence):
            raise ValueError(
                f"layers={self.layers!r} must be rising layers of the {self.draft.n_layers} there "
                "are, or None"
            )
        if self.layers is not None:
            check_layers(tuple(self.layers), self.draft.n_layers)
        if self.draft.never_causal:
            raise ValueError(
                "the draft model is a diffusion model, which never learned to write from left to "
                "right: draft with an autoregressive one"
            )
        if self.draft.writes_in_place:
            raise ValueError(
                "the draft model says a token where MASK stands, and drafts are read at the token "
                "before: draft with SelfSpeculation, or a model whose outputs are shifted"
            )
        if abs(self.draft.vocab_size - cfg.vocab_size) > MAX_PADDING:
            raise ValueError(
                f"the draft model has a vocabulary of {self.draft.vocab_size} tokens and the "
                f"target one of {cfg.vocab_size}: they must have the same, up to {MAX_PADDING} "
                "rows of padding"
            )

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> DraftState:
        n_layers = self.draft.n_layers if self.layers is None else len(self.layers)
        run = dataclasses.replace(self.draft, n_layers=n_layers)
        return DraftState(init_cache(run, batch_size, num_slots), jnp.zeros(batch_size, jnp.int32))

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: DraftState
    ) -> DraftState:
        def read(cache: KVCache) -> KVCache:
            return self._read(context, seen.tokens, seen.start, cache, None)

        if self._can_read_all(context):
            cache = read(state.cache)
        else:  # nobody asks about what lies beyond the context
            is_within = (seen.start < self.draft.max_seq_len) & (seen.count > 0)
            cache = in_place(is_within.any(), read, state.cache)
        known = jnp.where(seen.count > 0, seen.start + seen.count, state.known)
        return DraftState(cache, known)

    def propose(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        has_room = context.length <= self.draft.max_seq_len
        context = context.replace(active=context.active & has_room)

        def draft(state: DraftState) -> Proposal:
            proposal = self.draft_tree(cfg, context, state)
            cost = jnp.where(has_room, proposal.cost, 0)
            return proposal.replace(tree=self._within(context, proposal.tree), cost=cost)

        if self._can_read_all(context):
            return draft(state)
        nothing = no_proposal(lambda: draft(state), context, state)
        return in_place(context.active.any(), lambda nothing: draft(nothing.state), nothing)

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        """As `propose`, of active rows: texts which the draft model can read to their end."""
        raise NotImplementedError

    def _can_read_all(self, context: Context) -> bool:
        """Whether no text can outgrow the draft model's context."""
        return context.tokens.shape[1] <= self.draft.max_seq_len

    def keep(
        self, cfg: ModelConfig, state: DraftState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[DraftState, jax.Array]:
        known, scaling = jnp.minimum(state.known, num_kept), self.draft.rope_scaling
        if scaling is not None and scaling.needs_length:  # other keys in a text of another length
            known = jnp.zeros_like(known)
        return state.replace(known=known), known

    def _logits(self, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
        """[..., V] float32 over the target's tokens: those that are padding of one are impossible.

        Args:
          cfg: the target.
          hidden: [..., D]. Of the draft model.
        """
        logits = vocab.logits(vocab.head(self.params), hidden)[..., : cfg.vocab_size]
        missing = cfg.vocab_size - logits.shape[-1]
        lead = [(0, 0)] * (logits.ndim - 1)
        return jnp.pad(logits, [*lead, (0, missing)], constant_values=-jnp.inf)

    def _check_not_sampled(self) -> None:
        if self.is_sampled:
            raise ValueError("is_sampled=True does not go with the most probable tree")

    def _behind(
        self,
        cfg: ModelConfig,
        context: Context,
        cache: KVCache,
        tree: DraftTree,
        nodes: tuple[int, ...],
    ) -> jax.Array:
        """Logits [B, n, V] of what comes after some nodes of a tree.

        The cache holds what is before the root, and stays as it is.
        """
        start = context.length - 1
        positions, above = start[:, None] + tree.depths, pack_mask(tree.ancestors(self.depth))
        window = Window(tree.tokens, positions, above)
        hidden = self._forward(context, window, Slots.below(cache, start)).hidden
        return self._logits(cfg, hidden[:, jnp.array(nodes)])

    def _behind_some(
        self,
        cfg: ModelConfig,
        context: Context,
        cache: KVCache,
        tokens: jax.Array,
        parents: jax.Array,
        depths: tuple[int, ...],
        nodes: tuple[int, ...],
    ) -> jax.Array:
        """As `_behind`, of a tree whose nodes always have the same depths."""
        rows = jnp.broadcast_to(jnp.array(depths, jnp.int32), tokens.shape)
        tree = DraftTree(tokens, parents, rows, jnp.ones(tokens.shape, bool))
        return self._behind(cfg, context, cache, tree, nodes)

    def _within(self, context: Context, tree: DraftTree) -> DraftTree:
        """Without the nodes that the draft model would have to guess beyond its context length."""
        has_room = context.length[:, None] + tree.depths < self.draft.max_seq_len + 2
        return tree.replace(is_valid=tree.is_valid & (has_room | (tree.depths == 0)))

    def _forward(self, context: Context, window: Window, slots: Slots) -> decoder.ForwardOutput:
        slots = slots.replace(length=context.end)
        return decoder.forward(self.params, self.draft, window, slots, layers=self.layers)

    def _read(
        self,
        context: Context,
        tokens: jax.Array,
        start: jax.Array,
        cache: KVCache,
        rows: jax.Array | None,
    ) -> KVCache:
        """The cache with tokens [B, T] from positions start [B] on."""
        window = Window.at(tokens, start, is_causal=True)
        output = self._forward(context, window, Slots.append(cache, start, rows))
        assert output.cache is not None
        return output.cache

    def _catch_up(self, context: Context, state: DraftState) -> tuple[DraftState, jax.Array]:
        """All positions before the root are read, of active rows, in so many forwards [B]."""
        T, end = self.depth + 1, context.length - 1

        def is_behind(known: jax.Array) -> jax.Array:
            return (known < end) & context.active

        def read(carry: tuple[DraftState, jax.Array]) -> tuple[DraftState, jax.Array]:
            state, forwards = carry
            rows, place = is_behind(state.known), state.known[:, None] + jnp.arange(T)[None]
            tokens = jnp.take_along_axis(context.tokens, place, axis=1, mode="clip")
            cache = self._read(context, tokens, state.known, state.cache, rows)
            known = jnp.where(rows, jnp.minimum(state.known + T, end), state.known)
            return DraftState(cache, known), forwards + rows

        start = state, jnp.zeros_like(end)
        caught_up: tuple[DraftState, jax.Array] = jax.lax.while_loop(
            lambda carry: is_behind(carry[0].known).any(), read, start
        )
        return caught_up
