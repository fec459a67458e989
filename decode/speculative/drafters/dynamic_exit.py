"""DEL: the target drafts for itself with its first layers; how many, and how far, every round says.

Reference: Entezari Zarch et al., "DEL: Context-Aware Dynamic Exit Layer for Efficient
Self-Speculative Decoding", arXiv:2504.05598, for models trained like those of LayerSkip (Elhoushi
et al., arXiv:2404.16710, `train.objectives.layer_skip`); of others exits are poor, which is soon
found out. With a_l the estimated acceptance of a draft from the first l of L layers,

    TPL(l, d) = (1 - a_l^(d + 1)) / (1 - a_l) / (d l + L)       tokens per layer

is what a round of d drafts commits per layer that is run, and the best (l, d) is chosen, d = 0
included. What judges leaves the residual stream of all positions at every exit, so "shadow tokens"
tell what each would have drafted: a_l is the share of them that are what the target says, of the
root and the drafts that were kept, of earlier rounds with a weight that fades by `memory`. Before
the first round they are those of the prompt's last positions; rounds in which nobody was asked are
not compared, as that would take longer than drafts save. Drafting ends early where the product of
the exit's largest probabilities falls below a_l^d, what the last of d drafts was chosen for.

Which layers run is data (`sublayers` of `dlm.models.decoder.forward`), of every row its own. Drafts
use the target's cache: the keys of its first layers are those that it would write itself.

Deviations: the rule by which drafts end early is ours, as the publication's is not known to us in
detail, and so is what is assumed before anything was seen; what judges runs all layers of all
drafts (as TPL counts it), and does not go on from the exit's states.

Letters: B rows, L layers, n exits, J drafts, P shadowed positions of a prompt, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from decode.core.loop import of_rows
from decode.core.requests import whole_number
from decode.core.sampling import draw
from decode.core.streams import fold_in
from decode.speculative.contracts import Context, Drafter, Proposal, Seen, within
from decode.speculative.tree import TreeShape, chain
from dlm import vocab
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window

SUREST = 0.99  # of all estimates


class DynamicExitState(struct.PyTreeNode):
    """What exits were worth so far.

    Attributes:
      matches: [B, n] float32. Shadow tokens that the target said, too; fading.
      seen: [B] float32. Shadow tokens of each exit; fading.
    """

    matches: jax.Array
    seen: jax.Array


@struct.dataclass
class DynamicExit(Drafter):
    """A chain from an early exit of the target; nothing is trained but, at best, the exits.

    Attributes:
      exits: n numbers of layers that may be run, rising, from 1 to L - 1. Each costs a reading of
        the vocabulary at J + 1 positions per round. Static.
      num_drafts: J >= 1, most tokens per round (published: about 18). Static.
      is_sampled: whether drafts are drawn from the exit's distribution (filtered as the target's,
        but for the repetition penalty), which wants `SpeculativeSampling` or `BlockVerification`;
        else they are its most probable tokens. Static.
      num_shadow: P >= 1, positions of each part of a prompt at which exits are compared. Static.
      memory: in [0, 1]. What a round leaves of what was seen before.
      prior: in [0, 0.99]. The estimate before anything was seen.
      weight: > 0. How many shadow tokens the prior counts for.
    """

    notices_pauses: ClassVar[bool] = True
    heeds_limits: ClassVar[bool] = True
    exits: tuple[int, ...] = struct.field(pytree_node=False)
    num_drafts: int = struct.field(pytree_node=False, default=8)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    num_shadow: int = struct.field(pytree_node=False, default=16)
    memory: jax.Array | float = 0.95
    prior: jax.Array | float = 0.5
    weight: jax.Array | float = 1.0

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(tuple(range(1, cfg.n_layers)), num_drafts=3, num_shadow=4)

    def validate(self, cfg: ModelConfig) -> None:
        if cfg.n_layers < 2:
            raise ValueError(f"exits={self.exits} need a model of two layers at least, not of one")
        several = self.exits if isinstance(self.exits, Sequence) else ()
        given = [whole_number("an entry of exits", layers) for layers in several]
        if not given or given != sorted(set(given) & set(range(1, cfg.n_layers))):
            raise ValueError(
                f"exits={self.exits} must be rising numbers of layers in [1, {cfg.n_layers - 1}]"
            )
        for name in ("num_drafts", "num_shadow"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, most in (("memory", 1), ("prior", SUREST)):
            if not 0 <= float(getattr(self, name)) <= most:
                raise ValueError(f"{name}={float(getattr(self, name)):g} must be in [0, {most}]")
        if not 0 < float(self.weight) < math.inf:
            raise ValueError(f"weight={float(self.weight):g} must be positive and finite")
        if cfg.writes_in_place:
            raise ValueError(
                "the model says a token where MASK stands, and drafts are read at the token "
                "before: draft with SelfSpeculation"
            )

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.exits

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> DynamicExitState:
        seen = jnp.zeros(batch_size)
        return DynamicExitState(jnp.zeros((batch_size, len(self.exits))), seen)

    def prefill(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: DynamicExitState
    ) -> DynamicExitState:
        num = min(self.num_shadow, seen.tokens.shape[1])
        place = seen.count[:, None] - num + jnp.arange(num)[None]  # the last ones
        take = lambda x: jnp.take_along_axis(  # noqa: E731
            x, jnp.maximum(place, 0)[..., None], axis=1
        )
        assert seen.features is not None
        said = vocab.read(vocab.head(context.params), take(seen.hidden)).token
        return self._compare(cfg, context, take(seen.features), said, place >= 0, state)

    def propose(self, cfg: ModelConfig, context: Context, state: DynamicExitState) -> Proposal:
        layers, num, rate = self._choose(cfg, state)
        num = jnp.minimum(num, within(context, self.num_drafts))
        B, J = len(num), self.num_drafts
        head, sampling = vocab.head(context.params), context.sampling
        is_drawn = self.is_sampled and sampling.temperature is not None
        law_of = sampling.replace(repetition_penalty=None).probs
        is_run = jnp.arange(cfg.n_layers)[None] < layers[:, None]
        run = jnp.broadcast_to(is_run[..., None], (*is_run.shape, 2))
        floor = rate**num

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            i, tokens, laws, cost, going, sure, cache = carry
            at = context.length - 1 + i
            slots = Slots.append(cache, at, going).replace(length=context.end)
            window = Window.at(tokens[:, i][:, None], at)
            output = decoder.forward(context.params, cfg, window, slots, sublayers=run)
            hidden = output.hidden[:, 0]
            if is_drawn:
                law = law_of(vocab.logits(head, hidden))
                token, most = draw(fold_in(context.key, i), law), law.max(axis=1)
                laws = laws.at[:, i].set(law)
            else:
                stats = vocab.read(head, hidden)
                token, most = stats.token, jnp.exp(stats.log_prob)
            sure *= most
            return (
                i + 1,
                tokens.at[:, i + 1].set(token.astype(jnp.int32)),
                laws,
                cost + going,
                going & (i + 1 < num) & (sure >= floor),
                sure,
                output.cache,
            )

        zeros = jnp.zeros(B, jnp.int32)
        tokens = jnp.zeros((B, J + 1), jnp.int32).at[:, 0].set(context.root)
        laws = jnp.zeros((B, J + 1, cfg.vocab_size)) if is_drawn else None
        going = context.active & (num > 0)
        start = jnp.zeros((), jnp.int32), tokens, laws, zeros, going, jnp.ones(B), context.cache
        _, tokens, laws, cost, _, _, cache = jax.lax.while_loop(
            lambda carry: carry[4].any(), step, start
        )
        is_valid = jnp.arange(J + 1)[None] <= cost[:, None]
        tree = self.shape.tree(tokens, is_valid, probs=laws)
        return Proposal(tree, cost, state, cache=cache)

    def observe(
        self, cfg: ModelConfig, context: Context, seen: Seen, state: DynamicExitState
    ) -> DynamicExitState:
        assert seen.features is not None and seen.chosen is not None and seen.last is not None
        index = jnp.arange(seen.tokens.shape[1])[None]
        is_there, is_last = index < seen.count[:, None], index == seen.count[:, None] - 1
        # Of those that were kept it said what is behind them, whoever drafted, in whatever tree.
        behind = jnp.take_along_axis(seen.chosen, seen.last[:, None], axis=1)
        said = jnp.where(is_last, behind, jnp.roll(seen.tokens, -1, axis=1))
        new = self._compare(cfg, context, seen.features, said, is_there, state)
        return of_rows(context.active, new, state)

    def _compare(
        self,
        cfg: ModelConfig,
        context: Context,
        features: jax.Array,
        said: jax.Array,
        is_there: jax.Array,
        state: DynamicExitState,
    ) -> DynamicExitState:
        """The state after shadow tokens of features [B, T, n D], beside what the target said [B, T]
        at those positions that are there [B, T]."""
        B, T = said.shape
        streams = features.reshape(B, T, len(self.exits), -1)
        hidden = decoder.final_hidden(context.params, cfg, streams)
        shadow = vocab.read(vocab.head(context.params), hidden).token  # [B, T, n]
        is_match = (shadow == said[..., None]) & is_there[..., None]
        num = is_there.sum(axis=1)
        fade = jnp.where(num > 0, self.memory, 1.0)
        return DynamicExitState(
            matches=state.matches * fade[:, None] + is_match.sum(axis=1),
            seen=state.seen * fade + num,
        )

    def _choose(
        self, cfg: ModelConfig, state: DynamicExitState
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each row: how many layers and how many drafts, [B] int32, and the estimate of a_l."""
        rates = (state.matches + self.weight * self.prior) / (state.seen[:, None] + self.weight)
        rates = jnp.minimum(rates, SUREST)  # [B, n]
        value = tokens_per_layer(rates, jnp.array(self.exits), self.num_drafts, cfg.n_layers)
        best = jnp.argmax(value.reshape(len(rates), -1), axis=1)
        place, num = best // (self.num_drafts + 1), best % (self.num_drafts + 1)
        rate = jnp.take_along_axis(rates, place[:, None], axis=1)[:, 0]
        return jnp.array(self.exits)[place], num.astype(jnp.int32), rate


def tokens_per_layer(
    rates: jax.Array, exits: jax.Array, num_drafts: int, num_layers: int
) -> jax.Array:
    """TPL: tokens that a round commits on average, per layer that is run.

    Args:
      rates: [B, n] float32. Acceptance of a draft, by exit; below 1.
      exits: [n] int32. Layers of each exit.
      num_drafts: J.
      num_layers: L.

    Returns:
      [B, n, J + 1] float32, for 0 to J drafts.
    """
    num = jnp.arange(num_drafts + 1)
    tokens = (1 - rates[..., None] ** (num + 1)[None, None]) / (1 - rates[..., None])
    return tokens / (num[None] * exits[:, None] + num_layers)[None]
