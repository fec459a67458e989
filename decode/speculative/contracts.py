"""What a drafter is told, what it proposes, and what it must do.

A drafter proposes a tree of guesses per round (`decode.speculative.tree`). Its parameters are
leaves of it, its shape is static, and what it remembers is its state, which the loop carries.

Letters: B rows, S token slots, T positions seen at once, D width of the target, W nodes, J depth, E
rows of a drafter's own, k tokens that are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.component import Part
from decode.core.sampling import Sampling
from decode.speculative.tree import DraftTree, TreeShape
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Params

if TYPE_CHECKING:
    from decode.speculative.loop import SpeculativeMethod


class Context(struct.PyTreeNode):
    """What is known when a round begins.

    Attributes:
      params: the target's.
      tokens: [B, S] int32. Prompts and what was written so far, from slot 0; what lies behind is
        of no meaning.
      length: [B] int32. Tokens of it. The last one is the root of the draft tree.
      key: [B, 2] uint32. A random stream per row and round.
      sampling: how the target's text is drawn.
      active: [B] bool. Rows that this is about: those that are not done, or, where two drafters
        share a batch, those of one. States of the others need not be kept up, but for `observe`
        and `pause` of who notices pauses: there they stay.
      cache: the target's: keys and values of all positions before the root. None, as `params` are
        {}, where drafts are made apart from the target.
      end: [B] int32. The most positions that each row's text may have; None where nobody asks.
      prompt_len: [B] int32. Tokens of the text that were given; None where nobody asks.
      most_forwards: [] int32, at least 1. Forwards of its own that a drafter whose number of them
        follows from the text may make in this round; None: as many as it likes.
      may_pause: whether rounds may pass in which the drafter proposes nothing. Static.
      is_ahead: whether the last draft, if all are kept, is the next root: then nobody need read it
        in this round, as no token of the target's follows it. Static.
    """

    params: Params
    tokens: jax.Array
    length: jax.Array
    key: jax.Array
    sampling: Sampling
    active: jax.Array
    cache: KVCache | None
    end: jax.Array | None = None
    prompt_len: jax.Array | None = None
    most_forwards: jax.Array | None = None
    may_pause: bool = struct.field(pytree_node=False, default=False)
    is_ahead: bool = struct.field(pytree_node=False, default=False)

    @property
    def root(self) -> jax.Array:
        """[B] int32."""
        last = jnp.maximum(self.length - 1, 0)
        return jnp.take_along_axis(self.tokens, last[:, None], axis=1)[:, 0]


def within(context: Context, forwards: int) -> jax.Array:
    """[] int32: so many forwards, or as many as the round allows, if that is less."""
    most = jnp.asarray(forwards, jnp.int32)
    return most if context.most_forwards is None else jnp.minimum(most, context.most_forwards)


def spent(context: Context, forwards: int) -> jax.Array:
    """[B] int32: so many forwards of a draft model for every row, as a proposal's cost."""
    return jnp.full_like(context.length, forwards)


class ExtraRows(struct.PyTreeNode):
    """Positions of a drafter's own that the target reads in the same forward as the tree.

    They see the text before the root, and of the window what they say; nobody else sees them, and
    nothing of them is kept but their hidden states.

    Attributes:
      tokens: [B, E] int32.
      offsets: [B, E] int32. How many positions behind the root they stand.
      sees: [B, E, W + E] bool. Which nodes of the tree they see, and which of themselves.
      vectors: [B, E, D] float32. What is read there in the place of embedded tokens; None: those.
      nodes: [B, E] int32. The node that each row stands behind; None: that is of no interest.
    """

    tokens: jax.Array
    offsets: jax.Array
    sees: jax.Array
    vectors: jax.Array | None = None
    nodes: jax.Array | None = None

    def take(self, nodes: jax.Array, num: int) -> ExtraRows:
        """`num` rows, beside a tree of which only `nodes` [B, n] int32 are left.

        Those behind one of these nodes come first, else all keep their order.
        """
        (B, E), num_nodes = self.tokens.shape, self.sees.shape[2] - self.sees.shape[1]
        rows = jnp.broadcast_to(jnp.arange(E)[None], (B, E))
        if self.nodes is not None:
            is_behind = (self.nodes[..., None] == nodes[:, None]).any(axis=2)
            rows = jnp.argsort(~is_behind, axis=1, stable=True)
        rows = rows[:, :num]
        at = jax.vmap(lambda x, rows: x[rows])
        some = jax.tree.map(lambda x: at(x, rows), self.replace(nodes=None))
        columns = jnp.concatenate([nodes, num_nodes + rows], axis=1)
        return some.replace(sees=jnp.take_along_axis(some.sees, columns[:, None], axis=2))


class Proposal(struct.PyTreeNode):
    """What a drafter makes of a round.

    Attributes:
      tree: guesses under the root.
      cost: [B] int32. Forwards of a draft model that were made for each row.
      state: the drafter's, from now on.
      extra: rows of its own; None unless it has `num_extra`.
      grade: [B] int32, below `num_grades`. How sure it is, by whatever it can tell; None: 0.
      cache: the target's, if the drafter has written to it, in slots from the root's on, which are
        free: the round that judges writes there, too; None: it has not.
    """

    tree: DraftTree
    cost: jax.Array
    state: Any
    extra: ExtraRows | None = None
    grade: jax.Array | None = None
    cache: KVCache | None = None


class Marginals(struct.PyTreeNode):
    """What a drafter takes for likely at the next places, whatever stands at those before.

    Attributes:
      tokens: [B, J, k] int32. The most probable ones of each place, best first.
      log_probs: [B, J, k] float32. Of these, among all tokens and at temperature 1; -inf: it does
        not draft that.
      cost: [B] int32. As of a proposal.
      state: the drafter's, from now on.
    """

    tokens: jax.Array
    log_probs: jax.Array
    cost: jax.Array
    state: Any


def no_proposal(draft: Callable[[], Proposal], context: Context, state: Any) -> Proposal:
    """A root, in the shape of what `draft` would propose; the drafter's state is `state`."""
    made = jax.eval_shape(draft)
    like = made.replace(state=None, cache=None)
    empty: Proposal = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    tree = empty.tree.replace(
        tokens=empty.tree.tokens.at[:, 0].set(context.root),
        parents=empty.tree.parents.at[:, 0].set(-1),
        depths=empty.tree.depths.at[:, 1:].set(1),
        is_valid=empty.tree.is_valid.at[:, 0].set(True),
    )
    cache = None if made.cache is None else context.cache
    return empty.replace(tree=tree, state=state, cache=cache)


class Seen(struct.PyTreeNode):
    """Positions that the target has just read: a part of the prompt, or a root and its drafts.

    Attributes:
      tokens: [B, T] int32. What stands there.
      hidden: [B, T, D]. The target's final hidden states there.
      start: [B] int32. Where the first one is.
      count: [B] int32. How many of the T there are; what is behind them is of no meaning.
      features: [B, T, n D]. The target's features there; None unless the drafter has
        `feature_layers`.
      tree_hidden: [B, M, D], or None in the prompt. Hidden states of all nodes that were judged,
        kept or not: of a controller's choice, the root at least.
      tree: of them; None in the prompt.
      chosen: [B, M] int32. What the target itself puts after each node; None in the prompt.
      extra_hidden: [B, E, D]. Hidden states of the drafter's own rows, of a controller's choice the
        first ones; None if it has none.
      best: [B, M, k] int32. The target's most probable tokens after each node, best first; None in
        the prompt, and unless the drafter has `num_best`.
      last: [B] int32. The last node that was accepted, of those that were judged; None in the
        prompt.
      probs: [B, M, V] float32. The target's distribution after each node, filtered as its text is
        to be; None in the prompt, and unless the drafter `needs_probs`.
    """

    tokens: jax.Array
    hidden: jax.Array
    start: jax.Array
    count: jax.Array
    features: jax.Array | None = None
    tree_hidden: jax.Array | None = None
    tree: DraftTree | None = None
    chosen: jax.Array | None = None
    extra_hidden: jax.Array | None = None
    best: jax.Array | None = None
    last: jax.Array | None = None
    probs: jax.Array | None = None


@struct.dataclass
class Drafter(Part):
    """Who proposes?

    Most trees have one shape: a static field or a property `shape` of the class. Where another tree
    is made in every round, `num_nodes` and `depth` say how large it may be.

    Attributes:
      notices_pauses: whether it remembers rounds in which it was not asked by `pause`.
      heeds_limits: whether it never makes more forwards of its own than `Context.most_forwards`,
        but for what makes up for earlier rounds: for those whose number follows from the text.
      reads_text: whether it looks at nothing but the text: neither at the target's parameters and
        cache nor at its hidden states and choices. Then it can draft apart from the target.
    """

    notices_pauses: ClassVar[bool] = False
    heeds_limits: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        """Published settings, by the name under which users ask for them; none if it is trained."""
        return {}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        """A small one for a target, with fresh heads if it has any: what tests of all run."""
        return cls()

    @property
    def shape(self) -> TreeShape:
        """Of every tree."""
        raise NotImplementedError

    @property
    def num_nodes(self) -> int:
        """W, with the root."""
        return self.shape.num_nodes

    @property
    def depth(self) -> int:
        """J, of the deepest node."""
        return self.shape.depth

    @property
    def is_chain(self) -> bool:
        """Whether every node has at most one child, stored right behind it."""
        return self.shape.is_chain

    @property
    def draws(self) -> bool:
        """Whether drafts of drawn texts are drawn, too. Default: if it has `is_sampled`, and is."""
        return bool(getattr(self, "is_sampled", False))

    @property
    def needs_probs(self) -> bool:
        """Whether `Seen.probs` must be there: [B, W, V] then lives in memory."""
        return False

    @property
    def num_extra(self) -> int:
        """E, rows of its own in the judged window."""
        return 0

    def num_extra_beside(self, num_nodes: int) -> int:
        """How many of them, the first ones, are read where so many nodes are judged. Default: E."""
        return self.num_extra

    @property
    def num_marginals(self) -> int:
        """J, places of which it can tell the law at once, see `marginals`. Default: none."""
        return 0

    def params_of_extra(self, params: Params, num_nodes: int) -> Params:
        """The target's parameters for a forward over so many nodes and, behind them, its own rows.

        Nodes must be read as if they were `params`. Default: these.
        """
        return params

    @property
    def num_grades(self) -> int:
        """N, kinds of proposals that it tells apart: a controller learns what each is worth."""
        return 1

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """What it wants to see of the target, as in `dlm.models.decoder.forward`."""
        return ()

    @property
    def num_best(self) -> int:
        """k, how many of the target's most probable tokens after each node it wants to see."""
        return 0

    def refuse(self, method: SpeculativeMethod) -> str | None:
        """Why it makes no sense beside the other choices of a method, or None."""
        return None

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> Any:
        """Its state before anything was seen. Default: none."""
        return ()

    def prefill(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        """The state after a part of the prompt, all but its last token. Default: the same."""
        return state

    def propose(self, cfg: ModelConfig, context: Context, state: Any) -> Proposal:
        """A tree under `context.root`, what it cost, and the next state."""
        raise NotImplementedError

    def marginals(self, cfg: ModelConfig, context: Context, state: Any, k: int) -> Marginals:
        """Instead of `propose`, of one that has `num_marginals`: for trees that others make of it.

        `k` is at least 1; of fewer tokens than that all are named.
        """
        raise NotImplementedError

    def rows_beside(self, tree: DraftTree, state: Any) -> ExtraRows | None:
        """Its own rows in the window that judges a tree made of its `marginals`. Default: none."""
        return None

    def observe(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        """The state after a round; `context` is as before it. Default: the same."""
        return state

    def keep(
        self, cfg: ModelConfig, state: Any, length: jax.Array, num_kept: jax.Array
    ) -> tuple[Any, jax.Array]:
        """The state where a text has ended and another one follows that begins like it.

        Args:
          cfg: the target.
          state: after the last round of the text.
          length: [B] int32. Tokens of the text.
          num_kept: [B] int32. Tokens with which both begin.

        Returns:
          What of the state is true of them, and [B] int32: at most `num_kept`, the position from
          which on `prefill` must see the other text; it sees one at least. Default: all, and that.
        """
        return state, num_kept

    def pause(self, cfg: ModelConfig, context: Context, seen: Seen, state: Any) -> Any:
        """The state after a round in which it was not asked, of one that `notices_pauses`. Default:
        the same."""
        return state
