"""SWIFT: the target drafts for itself with some sublayers left out, which ones it finds as it goes.

Reference: Xia et al., "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
arXiv:2410.06916, and the public code.

    draft    one forward per token of the target without some of its attention and MLP sublayers,
             as long as the token is probable; it reads the target's cache. Every depth of the chain
             gets siblings, the more the less probable its token is; they stay leaves.
    search   as soon as W + 1 tokens are written, in every round: another set of sublayers is left
             out of one forward over the first W of them, and stays if it guesses more of the
             tokens behind them than any before. Sets are random ones, and now and then the one of
             many random ones with the best upper confidence bound of a Gaussian process.

Which sublayers run is data (`sublayers` of `dlm.models.decoder.forward`), of every row its own;
what no row runs costs nothing. Nothing of the search changes a text, and what the draft has written
to the cache is written over by the round that judges.

Deviations: the first set that is scored is the initial one, which otherwise any other would
replace; the Gaussian process (Matern 5/2) has a fixed length scale, half the root of the number of
sublayers, sees the last `num_remembered` trials, and its bound is maximised over random sets; of a
tree that does not fit into `budget` the deepest nodes are left out.

Letters: B rows, L layers, n sublayers that may be left out, J drafts in a chain, R most children of
a node, W nodes (of the search: tokens), M remembered trials, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.core.loop import in_place
from decode.core.streams import fold_in, uniforms, wrap
from decode.speculative.contracts import Context, Drafter, Proposal, within
from decode.speculative.drafters.gaussian_process import upper_bound
from decode.speculative.drafters.side_leaves import (
    CHILDREN,
    DRAWN_CHILDREN,
    are_drafted,
    grow,
)
from decode.speculative.tree import DraftTree
from dlm import vocab
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.models import decoder
from dlm.params import Params
from dlm.window import Slots, Window

if TYPE_CHECKING:
    from decode.speculative.loop import SpeculativeMethod

PROPOSED = 512  # sets among which the Gaussian process chooses


class SwiftState(struct.PyTreeNode):
    """What was found, and what was tried.

    Attributes:
      skipped: [B, n] bool. Of layers 1 to L - 2 attention and MLP, in turn: the best set so far.
      best: [B] float32. Its score; -1 before it has one.
      rounds: [B] int32. Rounds that were drafted.
      trials: [B] int32. Sets that were scored.
      failures: [B] int32. Of these, how many since the best one.
      sets: [B, M, n] bool. The last ones that were scored.
      scores: [B, M] float32. Of these.
    """

    skipped: jax.Array
    best: jax.Array
    rounds: jax.Array
    trials: jax.Array
    failures: jax.Array
    sets: jax.Array
    scores: jax.Array


@struct.dataclass
class Swift(Drafter):
    """A chain with side leaves from the target's own sublayers; nothing is trained.

    Where texts end, `~run_of(state.skipped, cfg)` [B, L, 2] are the best sets of their state: with
    one of them further texts of this kind may start.

    Attributes:
      skipped: [L, 2] bool. Attention and MLP sublayers that are left out at first, of the first and
        the last layer none; None: both of every second layer.
      num_drafts: J >= 1, depth of the chain. Static.
      budget: >= 1, nodes that are judged, the root aside. Static.
      max_children: in [1, 10], the most children of a node; 1: a chain. Static.
      is_sampled: whether children are drawn without replacement (filtered as the target's text, but
        for the repetition penalty), for `SpeculativeSampling`; else they are the most probable
        tokens. Static.
      floor: in [0, 1]; a chain ends with a token that is less probable.
      ratio: in [0, 1], share of the sublayers that proposed sets leave out, rounded down.
      context_window: W >= 1, tokens on which sets are scored. Static.
      num_remembered: M >= 1. Static.
      interval: >= 1, rounds from one trial to the next.
      bayes_interval: >= 1; every such trial is one of the Gaussian process.
      max_score: in [0, 1]; the search ends with a better one.
      max_failures: >= 0, trials without success after which it ends.
      max_trials: >= 0; 0: there is no search. The public code makes one more.
      seed: >= 0, of the sets that are proposed.
    """

    heeds_limits: ClassVar[bool] = True
    skipped: jax.Array | None = None
    num_drafts: int = struct.field(pytree_node=False, default=25)
    budget: int = struct.field(pytree_node=False, default=63)
    max_children: int = struct.field(pytree_node=False, default=10)
    is_sampled: bool = struct.field(pytree_node=False, default=False, kw_only=True)
    floor: jax.Array | float = 0.8
    ratio: jax.Array | float = 0.45
    context_window: int = struct.field(pytree_node=False, default=32)
    num_remembered: int = struct.field(pytree_node=False, default=256)
    interval: jax.Array | int = 1
    bayes_interval: jax.Array | int = 25
    max_score: jax.Array | float = 0.95
    max_failures: jax.Array | int = 300
    max_trials: jax.Array | int = 1000
    seed: jax.Array | int = 0

    @classmethod
    def points(cls) -> Mapping[str, Drafter]:
        return {"swift": cls()}

    @classmethod
    def example(cls, cfg: ModelConfig, params: Params) -> Self:
        return cls(num_drafts=3, budget=8, max_children=3, context_window=3, num_remembered=4)

    def validate(self, cfg: ModelConfig) -> None:
        low = {"num_drafts": 1, "budget": 1, "context_window": 1, "num_remembered": 1}
        low |= {"interval": 1, "bayes_interval": 1, "max_failures": 0, "max_trials": 0, "seed": 0}
        for name, least in low.items():
            if int(getattr(self, name)) < least:
                raise ValueError(f"{name}={int(getattr(self, name))} must be at least {least}")
        if not 1 <= self.max_children <= CHILDREN[-1]:
            raise ValueError(f"max_children={self.max_children} must be in [1, {CHILDREN[-1]}]")
        for name in ("floor", "ratio", "max_score"):
            if not 0 <= float(getattr(self, name)) <= 1:
                raise ValueError(f"{name}={float(getattr(self, name)):g} must be in [0, 1]")
        if self.skipped is not None:
            skipped = np.asarray(self.skipped)
            if skipped.shape != (cfg.n_layers, 2):
                raise ValueError(
                    f"skipped has shape {skipped.shape}, which must be [n_layers={cfg.n_layers}, "
                    "2]: whether attention and MLP of each layer are left out"
                )
            if skipped.dtype != bool:
                raise ValueError(f"skipped has dtype {skipped.dtype}, which must be bool")
            if skipped[0].any() or skipped[-1].any():
                raise ValueError("skipped has the first or the last layer, which must be run")
        if cfg.writes_in_place:
            raise ValueError(
                "the model says a token where MASK stands, and drafts are read at the token "
                "before: draft with SelfSpeculation"
            )

    def refuse(self, method: SpeculativeMethod) -> str | None:
        if self.is_sampled and method.controller is not None:
            return (
                "is_sampled=True does not go with a controller: the tree's shape follows from what "
                "was drawn, and so would what is judged"
            )
        return None

    @property
    def is_chain(self) -> bool:
        return self.max_children == 1

    @property
    def num_nodes(self) -> int:
        return 1 + min(self.budget, self.num_drafts * self.max_children)

    @property
    def depth(self) -> int:
        return min(self.num_drafts, self.budget)

    def init(self, cfg: ModelConfig, batch_size: int, num_slots: int) -> SwiftState:
        B, n, M = batch_size, 2 * max(cfg.n_layers - 2, 0), self.num_remembered
        if self.skipped is None:
            first = jnp.arange(n) // 2 % 2 == 0  # layers 1, 3, ..
        else:
            first = jnp.asarray(self.skipped)[1:-1].reshape(n)
        zeros = jnp.zeros(B, jnp.int32)
        return SwiftState(
            skipped=jnp.broadcast_to(first[None], (B, n)),
            best=jnp.full(B, -1.0, jnp.float32),
            rounds=zeros,
            trials=zeros,
            failures=zeros,
            sets=jnp.zeros((B, M, n), bool),
            scores=jnp.zeros((B, M)),
        )

    def propose(self, cfg: ModelConfig, context: Context, state: SwiftState) -> Proposal:
        before = state.trials
        if cfg.n_layers > 2:
            state = self._search(cfg, context, state)
        trials = state.trials - before  # each is a forward
        most = jnp.minimum(within(context, 1 + self.num_drafts) - trials.max(), self.num_drafts)
        cache, cost, tree = self._draft(cfg, context, state.skipped, most)
        state = state.replace(rounds=state.rounds + 1)
        return Proposal(tree, cost + trials, state, cache=cache)

    # ---- The draft ------------------------------------------------------------------------------

    def _draft(
        self, cfg: ModelConfig, context: Context, skipped: jax.Array, most: jax.Array
    ) -> tuple[KVCache, jax.Array, DraftTree]:
        """The written cache, forwards per row [B] int32, at most so many, and the tree."""
        B, J = len(context.length), self.num_drafts
        R = min(self.max_children, cfg.vocab_size)
        head, sampling = vocab.head(context.params), context.sampling
        is_drawn = self.is_sampled and sampling.temperature is not None
        table = DRAWN_CHILDREN if is_drawn else CHILDREN
        law_of = sampling.replace(repetition_penalty=None).probs
        run = run_of(skipped, cfg)

        def step(carry: _Drafting) -> _Drafting:
            i, at = carry.step, context.length - 1 + carry.step
            slots = Slots.append(carry.cache, at, carry.going).replace(length=context.end)
            window = Window.at(carry.token[:, None], at)
            output = decoder.forward(context.params, cfg, window, slots, sublayers=run)
            assert output.cache is not None
            hidden, laws = output.hidden[:, 0], carry.laws
            if is_drawn:
                assert laws is not None
                logits = vocab.logits(head, hidden)
                law = law_of(logits)
                laws = laws.at[:, i].set(law)
                # The order of noisy log-probabilities is that of draws without replacement.
                noisy, found = jax.lax.top_k(jnp.log(law) + _gumbel(context.key, i, law), R)
                found = jnp.where(noisy > -jnp.inf, found, -1)
                sure = jnp.take_along_axis(jax.nn.softmax(logits), found[:, :1], axis=1)[:, 0]
            else:
                stats = vocab.read(head, hidden, k=R)
                assert stats.top_tokens is not None and stats.top_log_probs is not None
                found, sure = stats.top_tokens, jnp.exp(stats.top_log_probs[:, 0])
            assert context.end is not None
            found = found.astype(jnp.int32)
            new = are_drafted(found[:, None], sure[:, None], table).sum(axis=(1, 2))
            num = carry.num + jnp.where(carry.going, new, 0)
            goes_on = (sure >= self.floor) & (context.length + i + 2 < context.end)
            goes_on &= num < self.num_nodes - 1  # or else what comes would not fit
            return _Drafting(
                step=i + 1,
                num=num,
                token=found[:, 0],
                going=carry.going & goes_on,
                cost=carry.cost + carry.going,
                children=carry.children.at[:, i].set(found),
                sure=carry.sure.at[:, i].set(sure),
                laws=laws,
                cache=output.cache,
            )

        cache = context.cache
        assert cache is not None  # it needs the target's layers
        start = _Drafting(
            step=jnp.zeros((), jnp.int32),
            num=jnp.zeros(B, jnp.int32),
            token=context.root,
            going=context.active,
            cost=jnp.zeros(B, jnp.int32),
            children=jnp.full((B, J, R), -1, jnp.int32),
            sure=jnp.zeros((B, J)),
            laws=jnp.zeros((B, J, cfg.vocab_size)) if is_drawn else None,
            cache=cache,
        )
        done = jax.lax.while_loop(lambda c: c.going.any() & (c.step < most), step, start)
        tree = grow(
            context.root, done.children, done.sure, done.cost, table, self.num_nodes, done.laws
        )
        return done.cache, done.cost, tree

    # ---- The search -----------------------------------------------------------------------------

    def _search(self, cfg: ModelConfig, context: Context, state: SwiftState) -> SwiftState:
        """The state after a trial of the rows that are to make one."""
        assert context.prompt_len is not None
        num_written = context.length - context.prompt_len
        is_due = context.active & (num_written > self.context_window + 1)
        is_due &= (state.best <= self.max_score) & (state.failures <= self.max_failures)
        is_due &= within(context, 2) > 1  # a draft comes behind it
        is_due &= (state.trials < self.max_trials) & (state.rounds % self.interval == 0)

        def trial(state: SwiftState) -> SwiftState:
            rows, place = jnp.arange(len(is_due)), state.trials % self.num_remembered
            candidate = self._candidate(state, is_due)
            score = self._score(cfg, context, candidate)
            is_better = is_due & (score > state.best)
            failed = is_due & ~is_better
            place = jnp.where(is_due, place, self.num_remembered)
            return state.replace(
                skipped=jnp.where(is_better[:, None], candidate, state.skipped),
                best=jnp.where(is_better, score, state.best),
                trials=state.trials + is_due,
                failures=jnp.where(is_better, 0, state.failures + failed),
                sets=state.sets.at[rows, place].set(candidate, mode="drop"),
                scores=state.scores.at[rows, place].set(score, mode="drop"),
            )

        return in_place(is_due.any(), trial, state)

    def _candidate(self, state: SwiftState, is_due: jax.Array) -> jax.Array:
        """[B, n] bool: the set that each row tries; at first its own."""
        B, n = state.skipped.shape
        words = jnp.stack([jnp.asarray(self.seed, jnp.uint32), jnp.uint32(n)])
        key = fold_in(jnp.broadcast_to(words[None], (B, 2)), state.trials)
        random = self._random_sets(key, n, 1)[:, 0]
        is_bayes = ((state.trials + 1) % self.bayes_interval == 0) & (state.trials > 0)

        def most_promising(candidate: jax.Array) -> jax.Array:
            sets = self._random_sets(fold_in(key, 1), n, PROPOSED)
            is_known = jnp.arange(self.num_remembered)[None] < state.trials[:, None]
            bound = jax.vmap(upper_bound)(state.sets, state.scores, is_known, sets)
            best = jnp.argmax(bound, axis=1)[:, None, None]
            found = jnp.take_along_axis(sets, best, axis=1)[:, 0]
            return jnp.where(is_bayes[:, None], found, candidate)

        candidate = in_place((is_bayes & is_due).any(), most_promising, random)
        return jnp.where(state.trials[:, None] == 0, state.skipped, candidate)

    def _random_sets(self, key: jax.Array, n: int, num: int) -> jax.Array:
        """[B, num, n] bool: sets of the size that `ratio` says."""
        coins = uniforms(key, num * n).reshape(-1, num, n)
        rank = jnp.argsort(jnp.argsort(coins, axis=2), axis=2)
        return rank < jnp.floor(n * jnp.asarray(self.ratio) + 1e-4).astype(jnp.int32)

    def _score(self, cfg: ModelConfig, context: Context, skipped: jax.Array) -> jax.Array:
        """[B] float32: share of the first tokens behind which the next one is guessed."""
        assert context.prompt_len is not None
        start = context.prompt_len
        place = start[:, None] + jnp.arange(self.context_window + 1)[None]
        text = jnp.take_along_axis(context.tokens, place, axis=1, mode="clip")
        assert context.cache is not None
        output = decoder.forward(
            context.params,
            cfg,
            Window.at(text[:, :-1], start, is_causal=True),
            Slots.below(context.cache, start).replace(length=context.end),
            sublayers=run_of(skipped, cfg),
        )
        guessed = vocab.read(vocab.head(context.params), output.hidden).token
        return (guessed == text[:, 1:]).mean(axis=1, dtype=jnp.float32)


class _Drafting(struct.PyTreeNode):
    """What a draft carries from forward to forward.

    Attributes:
      step: scalar int32. Forwards so far.
      num: [B] int32. Nodes so far, the root aside.
      token: [B] int32. What is read next.
      going: [B] bool. Rows that go on.
      cost: [B] int32. Forwards of each row.
      children: [B, J, R] int32. By depth, the first one's are the chain; -1: there is none.
      sure: [B, J] float32. How probable the first one is.
      laws: [B, J, V] float32. What they were drawn from; None if they were not.
      cache: the target's.
    """

    step: jax.Array
    num: jax.Array
    token: jax.Array
    going: jax.Array
    cost: jax.Array
    children: jax.Array
    sure: jax.Array
    laws: jax.Array | None
    cache: KVCache


def run_of(skipped: jax.Array, cfg: ModelConfig) -> jax.Array:
    """[B, L, 2] bool: the sublayers that are run, of those left out [B, n] bool."""
    inner = ~skipped.reshape(len(skipped), -1, 2)
    rest = cfg.n_layers - inner.shape[1]
    ends = ((0, 0), (rest - rest // 2, rest // 2), (0, 0))
    return jnp.pad(inner, ends, constant_values=True)


def _gumbel(key: jax.Array, step: jax.Array, like: jax.Array) -> jax.Array:
    """Standard Gumbel noise, as an array `like` [B, V], from a stream [B, 2] uint32 per row."""
    one = lambda key: jax.random.gumbel(wrap(key), like.shape[1:])  # noqa: E731
    return jax.vmap(one)(fold_in(key, step))
