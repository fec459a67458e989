"""The target drafts for itself, behind masks that it reads in the forward that judges.

References: An et al., arXiv:2504.18583; Samragh et al., arXiv:2507.11851, Sec. 3; see
`dlm.heads.masks`. Behind a node of the chain stand J masks, rows of the drafter's own: if it is the
last node that is accepted, what they guess are the drafts of the next round, for the token that the
target itself puts behind the node is its root. There are masks

    quadratic   behind every node: (J + 1)^2 rows, and drafts in all rounds but the first
    linear      behind the last draft: 2 J + 1 rows, and drafts after rounds that kept all of theirs

so a round that is asked for drafts never runs another forward. Drafts are guessed independently of
each other. Nodes are read by the target's own weights, masks are never written into a text, and
nothing of them stays in the cache.

Letters: B rows, W nodes, J drafts and masks of a set, A sets, E = A J, D width of the target.
"""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import draw
from decode.speculative.contracts import (
    Context,
    Drafter,
    ExtraRows,
    Marginals,
    Proposal,
    Seen,
    spent,
)
from decode.speculative.tree import DraftTree, TreeShape, chain
from dlm import vocab
from dlm.config import ModelConfig
from dlm.heads.draft_vocab import spread
from dlm.heads.masks import MaskHeads, MaskNetwork
from dlm.params import Params


class MasksState(struct.PyTreeNode):
    """What was guessed behind the root.

    Attributes:
      hidden: [B, J, D]. Final states of the masks behind the position before the root.
      is_known: [B] bool. Whether there were any.
    """

    hidden: jax.Array
    is_known: jax.Array


@struct.dataclass
class Masks(Drafter):
    """A chain that the target itself guesses, behind learned masks beside the one that is judged.

    Attributes:
      network: of `dlm.heads.masks.load`.
      num_drafts: >= 0, J; 0: as many masks as were trained, which only shared ones may exceed.
        Static.
      is_quadratic: whether masks stand behind every node, not behind the last draft only. Static.
      is_sampled: whether drafts are drawn from what the masks say, for `SpeculativeSampling` and
        `BlockVerification`; else they are the most probable tokens (as published). Static.
    """

    notices_pauses: ClassVar[bool] = True

    network: MaskNetwork
    num_drafts: int = struct.field(pytree_node=False, default=0)
    is_quadratic: bool = struct.field(pytree_node=False, default=True, kw_only=True)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        heads = MaskHeads(num_masks=3, rank=2)
        return cls(heads.network(cfg, heads.fresh(jax.random.key(0), cfg, params)))

    def validate(self, cfg: ModelConfig) -> None:
        if (width := self.network.own["vectors"].shape[1]) != cfg.d_model:
            raise ValueError(
                f"the masks are for a target of d_model={width}, and this one has {cfg.d_model}: "
                "train masks for it"
            )
        if cfg.writes_in_place:
            raise ValueError(
                "the masks are for a target that predicts the next token, and this one's output is "
                "about the token that it stands at: use SelfSpeculation"
            )
        most = self.network.num_masks
        if self.num_drafts < 0 or (self.num_drafts > most and not self.network.is_shared):
            raise ValueError(
                f"num_drafts={self.num_drafts} must be in [0, {most}], the masks there are: only "
                "shared ones go further"
            )

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts or self.network.num_masks)

    @property
    def num_marginals(self) -> int:
        """None if drafts are drawn, or masks stand behind one node only: a tree has many ends."""
        return self.depth if self.is_quadratic and not self.is_sampled else 0

    @property
    def num_extra(self) -> int:
        return self.num_extra_beside(self.num_nodes)

    def num_extra_beside(self, num_nodes: int) -> int:
        return self.depth * (num_nodes if self.is_quadratic else 1)

    def params_of_extra(self, params: Params, num_nodes: int) -> Params:
        return self.network.beside(params, num_nodes)

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> MasksState:
        hidden = jnp.zeros((batch_size, self.depth, cfg.d_model), cfg.jnp_dtype)
        return MasksState(hidden, jnp.zeros(batch_size, bool))

    def propose(self, cfg: ModelConfig, context: Context, state: MasksState) -> Proposal:
        drafts, probs = self._read(cfg, context, state.hidden)
        tokens = jnp.concatenate([context.root[:, None], drafts], axis=1)
        is_valid = jnp.broadcast_to(state.is_known[:, None], tokens.shape).at[:, 0].set(True)
        tree = self.shape.tree(tokens, is_valid, probs)
        return Proposal(tree, spent(context, 0), state, self.rows_beside(tree, state))

    def marginals(self, cfg: ModelConfig, context: Context, state: MasksState, k: int) -> Marginals:
        head, ids = self.network.head(context.params), self.network.ids
        k = min(k, cfg.vocab_size if ids is None else len(ids))
        stats = vocab.read(head, state.hidden, k=k)
        assert stats.top_tokens is not None and stats.top_log_probs is not None
        tokens = stats.top_tokens if ids is None else ids[stats.top_tokens]
        log_probs = jnp.where(state.is_known[:, None, None], stats.top_log_probs, -jnp.inf)
        return Marginals(tokens, log_probs, spent(context, 0), state)

    def rows_beside(self, tree: DraftTree, state: MasksState) -> ExtraRows:
        """Sets of masks. A mask sees the nodes above its set, and the masks before it in the set.

        Reference: as `dlm.heads.masks.sees`, of a chain.
        """
        J, behind = self.depth, self._nodes(state, tree.tokens.shape[1])
        B, A = behind.shape
        above = jnp.take_along_axis(tree.ancestors(J), behind[..., None], axis=1)  # [B, A, W]
        of_set, place = jnp.divmod(jnp.arange(A * J), J)
        is_before = (of_set[:, None] == of_set[None]) & (place[:, None] >= place[None])
        is_before = jnp.broadcast_to(is_before[None], (B, A * J, A * J))
        depth = jnp.take_along_axis(tree.depths, behind, axis=1)
        place = jnp.broadcast_to(1 + place[None], (B, A * J))
        return ExtraRows(
            tokens=jnp.zeros((B, A * J), jnp.int32),
            offsets=jnp.repeat(depth, J, axis=1) + place,
            sees=jnp.concatenate([jnp.repeat(above, J, axis=1), is_before], axis=2),
            vectors=self.network.embedded(place),
            nodes=jnp.repeat(behind, J, axis=1),
        )

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: MasksState
    ) -> MasksState:
        """What the masks guess behind the last node that was accepted, if any stand there."""
        assert seen.extra_hidden is not None and seen.last is not None
        B, _, D = seen.extra_hidden.shape
        sets = seen.extra_hidden.reshape(B, -1, self.depth, D)  # of a controller's choice, fewer
        is_behind = self._nodes(state, sets.shape[1]) == seen.last[:, None]
        chosen = jnp.argmax(is_behind, axis=1)[:, None, None, None]
        hidden = jnp.take_along_axis(sets, chosen, axis=1)[:, 0]
        return MasksState(
            jnp.where(context.active[:, None, None], hidden, state.hidden),
            jnp.where(context.active, is_behind.any(axis=1), state.is_known),
        )

    def keep(
        self, cfg: ModelConfig, state: MasksState, length: jax.Array, num_kept: jax.Array
    ) -> tuple[MasksState, jax.Array]:
        """What was guessed was about the old text."""
        return state.replace(is_known=jnp.zeros_like(state.is_known)), num_kept

    def pause(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: MasksState
    ) -> MasksState:
        """What was guessed was about a root that has passed."""
        return state.replace(is_known=state.is_known & ~context.active)

    def _read(
        self, cfg: ModelConfig, context: Context, hidden: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Drafts [B, J], and if they are drawn the laws [B, W, V] of what follows each node."""
        head, ids = self.network.head(context.params), self.network.ids
        sampling = context.sampling
        if not self.is_sampled or sampling.temperature is None:
            token = vocab.read(head, hidden).token
            return token if ids is None else ids[token], None
        logits = vocab.logits(head, hidden)
        logits = logits if ids is None else spread(logits, ids, cfg.vocab_size)
        laws = sampling.replace(repetition_penalty=None).probs(logits)
        return draw(context.key, laws), jnp.pad(laws, ((0, 0), (0, 1), (0, 0)))

    def _nodes(self, state: MasksState, num_nodes: int) -> jax.Array:
        """[B, A] int32: of so many nodes those that masks stand behind."""
        if self.is_quadratic:
            nodes = jnp.arange(num_nodes, dtype=jnp.int32)[None]
            return jnp.broadcast_to(nodes, (len(state.is_known), num_nodes))
        return jnp.where(state.is_known, self.depth, 0)[:, None]
