"""SpecDec++: a draft model stops when one of its drafts is probably wrong, as a trained head says.

Reference: Huang et al., "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths",
arXiv:2405.19715, Sec. 3, and the public code. Behind a root, for k = 1, 2, ..

    the draft model reads the token before; the head says a_k, how likely it is accepted (a_1 = 1)
    X_k is drafted;  reach <- reach a_k
    stop if X_k ends the text, or k is as large as may be, or k >= least and 1 - reach > threshold

so the last draft is never judged by the head. Drafts are all verified, and whether there is a next
one follows from those before, so any rule stays exact. With draft steps that cost c and a target's
forward that costs C, C / (c + C) is a first guess of the threshold.

Rows stop on their own: the batch goes on until all have, and each is charged for its own forwards.
The first forward of a round reads the root and the token before it, which was the last draft if all
were kept, so k drafts cost k forwards.

Letters: B rows, S slots, W nodes, D width of the draft model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.sampling import draw
from decode.core.streams import fold_in
from decode.speculative.contracts import Context, Proposal, within
from decode.speculative.drafters.draft_model import DraftModel
from decode.speculative.drafters.smaller_model import DraftState
from decode.speculative.tree import chain
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.heads.specdec_pp import StopHead, log_verdict
from dlm.params import Params
from dlm.window import Slots, Window


class Drafted(struct.PyTreeNode):
    """A chain that grows.

    Attributes:
      tokens: [B, W] int32. The root and its drafts.
      probs: [B, W, V] float32. What drafts were drawn from, each in the row before its own; None.
      num: [B] int32. Drafts so far.
      reach: [B] float32. How likely all of them but the last are accepted.
      goes_on: [B] bool. Whether there will be more.
      cache: of the draft model.
    """

    tokens: jax.Array
    probs: jax.Array | None
    num: jax.Array
    reach: jax.Array
    goes_on: jax.Array
    cache: KVCache


@struct.dataclass
class SpecDecPP(DraftModel):
    """A draft model's chain, which ends where a trained head expects a rejection.

    Attributes:
      own: of `dlm.heads.specdec_pp.load`, or of a run; None is refused.
      threshold: in [0, 1], of the probability that a draft is rejected, above which it stops
        (published: 0.3).
      least: >= 1, drafts that are made before the head is asked (published: 2).
      num_drafts: >= 1, most tokens per round (published: 20). Static.
    """

    heeds_limits: ClassVar[bool] = True
    own: Params | None = None
    threshold: jax.Array | float = 0.3
    least: jax.Array | int = 2
    num_drafts: int = struct.field(pytree_node=False, default=20)

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        """The first layer of the target, and a fresh head."""
        own = StopHead(num_blocks=1).fresh(jax.random.key(0), cfg, params)
        return cls(params, cfg, own=own, threshold=0.6, least=1, num_drafts=4, layers=(0,))

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if not isinstance(self.own, Mapping) or "w" not in self.own:
            raise ValueError(
                f"own is a {type(self.own).__name__}, which must be the head's "
                "parameters: the second of what `dlm.heads.specdec_pp.load` returns"
            )
        if (shape := self.own["w"].shape) != (self.draft.d_model, 2):
            raise ValueError(
                f"own has a last matrix of shape {shape}, which must be ({self.draft.d_model}, 2): "
                "a head that was trained for this draft model"
            )
        if not 0 <= float(self.threshold) <= 1:
            raise ValueError(f"threshold={float(self.threshold):g} must be in [0, 1]")
        if int(self.least) < 1:
            raise ValueError(f"least={int(self.least)} must be at least 1")

    def draft_tree(self, cfg: ModelConfig, context: Context, state: DraftState) -> Proposal:
        behind = jnp.zeros_like(context.length)
        if context.may_pause:  # or else all but the last draft was read by the round before
            state, behind = self._catch_up(context, state)
        B, W = len(context.length), self.num_nodes
        is_drawn = self.is_sampled and context.sampling.temperature is not None
        # The first token of a text has none before it: the second place is then of no meaning.
        start = jnp.maximum(context.length - 2, 0)
        at = start[:, None] + jnp.arange(2)[None]
        tokens = jnp.take_along_axis(context.tokens, at, axis=1, mode="clip")
        slots = Slots.append(state.cache, start, context.active)
        output = self._forward(context, Window.at(tokens, start, is_causal=True), slots)
        place = (context.length - 1 - start)[:, None, None]
        assert output.cache is not None
        first = Drafted(
            tokens=jnp.zeros((B, W), jnp.int32).at[:, 0].set(context.root),
            probs=jnp.zeros((B, W, cfg.vocab_size)) if is_drawn else None,
            num=jnp.zeros(B, jnp.int32),
            reach=jnp.ones(B),
            goes_on=context.active,
            cache=output.cache,
        )
        hidden = jnp.take_along_axis(output.hidden, place, axis=1)[:, 0]
        found = jax.lax.while_loop(
            lambda drafted: drafted.goes_on.any(),
            lambda drafted: self._one_more(cfg, context, drafted),
            self._extend(cfg, context, first, hidden, jnp.ones(B)),
        )
        is_valid = jnp.arange(W)[None] <= found.num[:, None]
        tree = chain(self.num_drafts).tree(found.tokens, is_valid, found.probs)
        known = jnp.where(context.active, context.length + found.num - 1, state.known)
        cost = found.num + behind
        return Proposal(tree, cost, DraftState(found.cache, known))

    def _one_more(self, cfg: ModelConfig, context: Context, drafted: Drafted) -> Drafted:
        """One draft more, behind the last one, of rows that go on."""
        last = jnp.take_along_axis(drafted.tokens, drafted.num[:, None], axis=1)
        at = context.length - 1 + drafted.num
        slots = Slots.append(drafted.cache, at, drafted.goes_on)
        output = self._forward(context, Window.at(last, at), slots)
        assert output.cache is not None and self.own is not None
        hidden = output.hidden[:, 0]
        accepted = jnp.exp(log_verdict(self.own, hidden)[:, 1])
        return self._extend(cfg, context, drafted.replace(cache=output.cache), hidden, accepted)

    def _extend(
        self,
        cfg: ModelConfig,
        context: Context,
        drafted: Drafted,
        hidden: jax.Array,
        accepted: jax.Array,
    ) -> Drafted:
        """With the draft behind the token that `hidden` [B, D] is of, accepted so likely [B]."""
        rows, probs, on = jnp.arange(len(hidden)), drafted.probs, drafted.goes_on
        outside = drafted.tokens.shape[1]
        if probs is None:
            extra = range(cfg.vocab_size, self.draft.vocab_size)
            padding = jnp.array(extra, jnp.int32) if extra else None
            token = vocab.read(vocab.head(self.params), hidden, banned_ids=padding).token
        else:
            sampling = context.sampling.replace(repetition_penalty=None)
            law = sampling.probs(self._logits(cfg, hidden))
            token = draw(fold_in(context.key, drafted.num), law)
            probs = probs.at[rows, jnp.where(on, drafted.num, outside)].set(law, mode="drop")
        num, reach = drafted.num + on, jnp.where(on, drafted.reach * accepted, drafted.reach)
        may = on & (num < within(context, self.num_drafts))
        ends = jnp.array(cfg.eos_ids, jnp.int32)
        is_end = (token[:, None] == ends[None]).any(axis=1)
        return drafted.replace(
            tokens=drafted.tokens.at[rows, jnp.where(on, num, outside)].set(token, mode="drop"),
            probs=probs,
            num=num,
            reach=reach,
            goes_on=may & self.goes_on(num, reach, is_end),
        )

    def goes_on(self, num: jax.Array, reach: jax.Array, is_end: jax.Array) -> jax.Array:
        """[B] bool: whether more is drafted.

        Args:
          num: [B] int32. Drafts so far.
          reach: [B] float32. How likely all of them but the last are accepted.
          is_end: [B] bool. Whether the last ends the text.
        """
        doubts = (num >= self.least) & (1 - reach > self.threshold)
        return ~(is_end | doubts | (num >= self.num_drafts))
