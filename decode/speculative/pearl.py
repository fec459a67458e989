"""PEARL: the drafter goes on drafting while the target judges, each on devices of its own.

Reference: Liu et al., "PEARL: Parallel Speculative Decoding with Adaptive Draft Length",
arXiv:2408.11850, Alg. 2. With g drafts a round, of which some are pending: drafted in the round
before and not judged yet,

    at once   the drafter drafts Y_1 .. Y_g behind the text and what is pending, as if all of that
              held; the target makes one forward over the last token and what is pending
    then      what is pending and Y_1 are tested, from left to right, as `decode.speculative.accept`
              does. If all of them pass they are written, and Y_2 .. Y_g are pending; else those up
              to the first that does not, and a token of the target's, and nothing is pending.

A round with nothing pending is the publication's pre-verify, one with g - 1 its post-verify. Either
makes one forward of the target and g of the draft model, and as long as drafts are right the target
never waits: g = ceil(target's seconds / draft's seconds) has both done together. Where all pass, no
token of the target's is put behind them, as the drafter has gone on already.

Unlike the published code, no random number is used twice: there the number that let Y_1 pass in
pre-verify tests the next token, too, so that texts lean towards the drafter. Here every round draws
numbers of its own, and texts follow the target's law; greedy ones are its own, token for token.
With `Match` drawn ones are, too. Rows each have their own number of pending drafts.

A round is four programs, on two meshes or on one device:

    draft    on the drafter's mesh   } dispatched together
    judge    on the target's         }
    settle   on the target's: tests, writes, and says what became of the drafts
    follow   on the drafter's: its text and memory go on from there

What goes between meshes are drafts, with their laws if they were drawn, and a few numbers per row.
The host reads which rows are done one round late, while the next round is on its way.

Letters: B rows, S slots, G completion positions, g drafts, V vocabulary, W = g nodes that are
judged, T positions seen at once.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from decode.core.component import as_kind
from decode.core.loop import FOREVER
from decode.core.requests import PREFILL
from decode.core.results import TopTokens
from decode.core.sampling import Sampling
from decode.core.streams import Stream, fold_in
from decode.speculative.accept import Verdict, Walk
from decode.speculative.commit import commit
from decode.speculative.contracts import Context, Drafter, Proposal, Seen
from decode.speculative.judge import existing, judge_tree
from decode.speculative.loop import (
    SpeculativeMethod,
    SpeculativeState,
    init_state,
    prefill,
)
from decode.speculative.tree import DraftTree, TreeShape, chain
from dlm.cache import KVCache
from dlm.config import ModelConfig
from dlm.params import Params


class Pearl(SpeculativeMethod):
    """Drafts and judges at once.

    Example:
      >>> mesh = make_mesh(devices=jax.devices()[1:2])
      >>> draft = dlm.load("path/to/draft", mesh=mesh)
      >>> drafter = DraftModel(draft.params, draft.cfg, num_drafts=4)
      >>> complete(lm, "def fibonacci(n):", method=Pearl(drafter, mesh=mesh))

    The drafter makes chains from the text alone (`Drafter.reads_text`), and there is no controller.

    Attributes:
      mesh: where the drafter's parameters lie, and where it drafts; None: where the target is,
        which then gains nothing. Static.
    """

    mesh: Mesh | None = struct.field(pytree_node=False, default=None)

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        drafter, name = self.drafter, type(self.drafter).__name__
        if not drafter.reads_text:
            raise ValueError(
                f"drafter={name} needs more than the text that was judged last, and Pearl drafts "
                "behind tokens that are not judged yet: use DraftModel, PromptLookup or Suffix"
            )
        if not (self.mesh is None or isinstance(self.mesh, Mesh)):
            raise ValueError(f"mesh={self.mesh!r} must be a jax.sharding.Mesh, or None")
        if not drafter.is_chain or drafter.depth < 1:
            raise ValueError(f"drafter={name} must draft chains of one token at least with Pearl")
        if self.controller is not None:
            raise ValueError("controller must be None with Pearl, which judges what is pending")

    @property
    def at_target(self) -> SpeculativeMethod:
        """What the target's programs need of it: all but the drafter."""
        return SpeculativeMethod(
            Elsewhere(self.drafter.depth), self.acceptance, self.sampling, self.stop_ids,
            self.top_logprobs,
        )  # fmt: skip


@struct.dataclass
class Elsewhere(Drafter):
    """A chain that is drafted on other devices.

    Attributes:
      num_drafts: g >= 1. Static.
    """

    num_drafts: int = struct.field(pytree_node=False, default=4)

    @property
    def shape(self) -> TreeShape:
        return chain(self.num_drafts)


class DraftSide(struct.PyTreeNode):
    """What the drafter's devices know.

    Attributes:
      tokens: [B, S] int32. The text, and what is pending.
      length: [B] int32. Tokens of it.
      end: [B] int32. The most positions of the text.
      key: [B, 2] uint32. One random stream per row.
      has_stopped: [B] bool.
      num_rounds: [B] int32.
      memory: the drafter's state.
    """

    tokens: jax.Array
    length: jax.Array
    end: jax.Array
    key: jax.Array
    has_stopped: jax.Array
    num_rounds: jax.Array
    memory: Any


class PearlState(SpeculativeState):
    """What is carried from round to round; `drafter`, a `DraftSide`, lies on the drafter's devices.

    Attributes:
      pending: [B, W - 1] int32. Drafts behind the last token that are not judged yet.
      num_pending: [B] int32. How many of them there are.
      pending_probs: [B, W - 1, V] float32. Row i is the law that draft i was drawn from; None if
        drafts follow from the text.
    """

    pending: jax.Array
    num_pending: jax.Array
    pending_probs: jax.Array | None


class Outcome(struct.PyTreeNode):
    """What the drafter is told of a round.

    Attributes:
      start: [B] int32. Where the last token was before it.
      count: [B] int32. That token, and the drafts that were tested and kept.
      is_kept: [B] bool. Whether all that was tested is kept, so that the other drafts are pending.
      following: [B] int32. The target's token behind them, where not all are kept.
      has_stopped: [B] bool.
    """

    start: jax.Array
    count: jax.Array
    is_kept: jax.Array
    following: jax.Array
    has_stopped: jax.Array


def prepare(
    params: Params,
    cfg: ModelConfig,
    method: Pearl,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int = PREFILL,
    **asked: Any,
) -> PearlState:
    """The state before the first round: both models have read all prompts but their last tokens.

    Args:
      params, cfg: the target.
      method: how to decode; checked here.
      prompts, chunk, asked: as of `decode.speculative.loop.init_state`, which says what it raises.
    """
    method.validate(cfg)
    at_target = method.at_target
    state = init_state(cfg, at_target, prompts, chunk=chunk, **asked)
    state = prefill(params, cfg, at_target, state)
    known = state.tokens, state.prompt_len, state.end, state.key, state.has_stopped
    begin, by = functools.partial(_begin, cfg, chunk=state.chunk), (method.drafter, method.sampling)
    shape_of = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))  # noqa: E731
    shapes = jax.tree.map(shape_of, (*by, *known))
    if isinstance(state.tokens, jax.core.Tracer):  # `refill` asks for shapes, wherever they lie
        side = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(begin, *shapes))
    else:
        with _on(method.mesh):
            side = begin(*by, *_put(known, method.mesh))
    drafts, _, _ = jax.eval_shape(
        functools.partial(draft, cfg), *shapes[:2], *jax.tree.map(shape_of, (side, side.memory))
    )
    B, W = drafts.tokens.shape[0], drafts.tokens.shape[1] - 1
    return as_kind(
        PearlState,
        state,
        drafter=side,
        pending=jnp.zeros((B, W - 1), jnp.int32),
        num_pending=jnp.zeros(B, jnp.int32),
        pending_probs=None if drafts.probs is None else jnp.zeros((B, W - 1, cfg.vocab_size)),
    )


def decode(
    params: Params,
    cfg: ModelConfig,
    method: Pearl,
    state: PearlState,
    max_rounds: int = FOREVER,
    max_done: int = FOREVER,
) -> PearlState:
    """Rounds until every row is done, and perhaps one more, in which nothing happens.

    The arguments are those of `decode.core.loop.compile_decode`; the state is given away.
    """
    done = state.has_stopped
    for _ in range(max_rounds):
        if int(done.sum()) >= min(max_done, done.size):
            break
        done = state.has_stopped  # read after the next round is dispatched
        state = step(params, cfg, method, state)
    return state


def step(params: Params, cfg: ModelConfig, method: Pearl, state: PearlState) -> PearlState:
    """One round, dispatched and not waited for. Of the state caches are given away."""
    at_target, drafter, sampling = method.at_target, method.drafter, method.sampling
    side, cache, mesh = state.drafter, state.cache, method.mesh
    home = None if mesh is None else _sharding_of(state.length)
    state, memory, side = state.replace(drafter=None, cache=None), side.memory, _light(side)
    with _on(mesh):
        drafts, cost, memory = draft(cfg, drafter, sampling, side, memory)
    said, cache = judge(params, cfg, at_target, state, cache)
    there = (drafts, cost) if mesh is None else jax.device_put((drafts, cost), home)
    state, outcome = settle(cfg, at_target, state, *said, *there)
    with _on(mesh):
        side = follow(cfg, drafter, sampling, side, memory, drafts, _put(outcome, mesh))
    return state.replace(drafter=side, cache=cache)


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Where the drafter computes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _put(tree: Any, mesh: Mesh | None) -> Any:
    """Copies for the drafter."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _sharding_of(x: jax.Array) -> jax.sharding.Sharding:
    """All devices that an array is on, with a copy each."""
    at = x.sharding
    return NamedSharding(at.mesh, PartitionSpec()) if isinstance(at, NamedSharding) else at


def _light(side: DraftSide) -> DraftSide:
    """Without its memory, which is given away where the rest is not."""
    light: DraftSide = side.replace(memory=None)
    return light


def _context(sampling: Sampling, side: DraftSide) -> Context:
    return Context(
        params={},
        tokens=side.tokens,
        length=side.length,
        key=fold_in(fold_in(side.key, side.num_rounds), Stream.DRAFT),
        sampling=sampling,
        active=~side.has_stopped,
        cache=None,
        end=side.end,
        is_ahead=True,
    )


def _seen(tokens: jax.Array, start: jax.Array, count: jax.Array) -> Seen:
    """Of a text and nothing else: the hidden states have no width."""
    return Seen(tokens, jnp.zeros((*tokens.shape, 0)), start, count)


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def _begin(
    cfg: ModelConfig, drafter: Drafter, sampling: Sampling, tokens: jax.Array,
    prompt_len: jax.Array, end: jax.Array, key: jax.Array, has_stopped: jax.Array, chunk: int,
) -> DraftSide:  # fmt: skip
    """The drafter's side after prompts, which are read as `prefill` reads them."""
    B, g = len(tokens), drafter.depth
    tokens = jnp.pad(tokens, ((0, 0), (0, g)))  # what is pending may lie behind all that is asked
    S = tokens.shape[1]
    side = DraftSide(
        tokens, prompt_len, end, key, has_stopped, jnp.zeros(B, jnp.int32),
        drafter.init(cfg, B, S),
    )  # fmt: skip
    context = _context(sampling, side)

    def read(i: jax.Array, memory: Any) -> Any:
        start = jnp.broadcast_to(jnp.minimum(i * chunk, S - chunk), B)
        part = jax.lax.dynamic_slice_in_dim(tokens, start[0], chunk, axis=1)
        count = jnp.clip(prompt_len - 1 - start, 0, chunk)
        return drafter.prefill(cfg, context, _seen(part, start, count), memory)

    num_chunks = (prompt_len.max() - 1 + chunk - 1) // chunk
    return side.replace(memory=jax.lax.fori_loop(0, num_chunks, read, side.memory))


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("memory",))
def draft(
    cfg: ModelConfig, drafter: Drafter, sampling: Sampling, side: DraftSide, memory: Any
) -> tuple[DraftTree, jax.Array, Any]:
    """Drafts of tokens that the target has, what they cost [B], and what the drafter remembers."""
    proposal = drafter.propose(cfg, _context(sampling, side), memory)
    return existing(proposal.tree, drafter.depth, cfg.vocab_size), proposal.cost, proposal.state


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("cache",))
def judge(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: PearlState, cache: KVCache
) -> tuple[tuple[Verdict, jax.Array, TopTokens | None], KVCache]:
    """What the target says of the last token and what is pending, see `judge_tree`."""
    last = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
    tokens = jnp.concatenate([last, state.pending], axis=1)
    W = tokens.shape[1]
    tree = chain(W - 1).tree(tokens, jnp.arange(W)[None] <= state.num_pending[:, None])
    proposal = Proposal(tree, jnp.zeros_like(state.length), None)
    output, verdict, log_probs, top = judge_tree(
        params, cfg, method, state.replace(cache=cache), proposal
    )
    assert output.cache is not None
    return (verdict, log_probs, top), output.cache


@functools.partial(jax.jit, static_argnames=("cfg",))
def settle(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: PearlState,
    verdict: Verdict,
    log_probs: jax.Array,
    top: TopTokens | None,
    drafts: DraftTree,
    cost: jax.Array,
) -> tuple[PearlState, Outcome]:
    """Tests what was pending and the first of the new drafts, and writes.

    Args:
      cfg, method, state: of the round.
      verdict, log_probs, top: of `judge_tree`, about the last token and what is pending.
      drafts: root and new drafts, [B, g + 1].
      cost: [B] int32. Of them.
    """
    g, rows, num = method.drafter.depth, jnp.arange(len(cost)), state.num_pending
    one_more = lambda x: jnp.pad(x, ((0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)))  # noqa: E731
    tokens = one_more(verdict.tree.tokens).at[rows, num + 1].set(drafts.tokens[:, 1])
    is_valid = one_more(verdict.tree.is_valid).at[rows, num + 1].set(drafts.is_valid[:, 1])
    laws = None
    if drafts.probs is not None and state.pending_probs is not None:
        laws = one_more(one_more(state.pending_probs)).at[rows, num].set(drafts.probs[:, 0])
    tree = chain(g).tree(tokens, is_valid, laws)
    walk = method.acceptance.walk(
        verdict.replace(
            tree=tree,
            chosen=one_more(verdict.chosen),
            probs=None if verdict.probs is None else one_more(verdict.probs),
        ),
        g,
    )
    # What the target says behind the last draft is not known, nor asked for: that is what is put
    # behind the others.
    is_kept = walk.num_accepted == num + 1
    accepted = walk.num_accepted - is_kept
    bonus = jnp.where(is_kept, drafts.tokens[:, 1], walk.bonus)
    path = jnp.minimum(walk.path, accepted[:, None])
    outcome = Outcome(
        start=state.length - 1,
        count=walk.num_accepted + 1,
        is_kept=is_kept,
        following=bonus,
        has_stopped=state.has_stopped,
    )
    written: Any = commit(
        cfg, method, state, Proposal(tree, cost, None), Walk(path, accepted, bonus), log_probs, top
    )
    left = jnp.maximum(drafts.is_valid.sum(axis=1, dtype=jnp.int32) - 2, 0)
    state = written.replace(
        pending=drafts.tokens[:, 2:],
        num_pending=jnp.where(is_kept, left, 0),
        pending_probs=None if drafts.probs is None else drafts.probs[:, 1:g],
    )
    return state, outcome.replace(has_stopped=state.has_stopped)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("memory",))
def follow(
    cfg: ModelConfig,
    drafter: Drafter,
    sampling: Sampling,
    side: DraftSide,
    memory: Any,
    drafts: DraftTree,
    outcome: Outcome,
) -> DraftSide:
    """The drafter's side after a round; rows that are done stay as they are."""
    context, S = _context(sampling, side), side.tokens.shape[1]
    rows, index = jnp.arange(len(side.length))[:, None], jnp.arange(drafter.depth)[None]
    active, is_kept = ~side.has_stopped, outcome.is_kept
    num = drafts.is_valid.sum(axis=1, dtype=jnp.int32) - 1
    is_new = (active & is_kept)[:, None] & (index < num[:, None])
    place = jnp.where(is_new, side.length[:, None] + index, S)
    tokens = side.tokens.at[rows, place].set(drafts.tokens[:, 1:], mode="drop")
    behind = outcome.start + outcome.count
    place = jnp.where(active & ~is_kept, behind, S)[:, None]
    tokens = tokens.at[rows, place].set(outcome.following[:, None], mode="drop")
    length = jnp.where(is_kept, side.length + num, behind + 1)
    seen_at = outcome.start[:, None] + jnp.arange(drafter.num_nodes)[None]
    kept = jnp.take_along_axis(tokens, seen_at, axis=1, mode="clip")
    return side.replace(
        tokens=tokens,
        length=jnp.where(active, length, side.length),
        has_stopped=outcome.has_stopped,
        num_rounds=side.num_rounds + active,
        memory=drafter.observe(cfg, context, _seen(kept, outcome.start, outcome.count), memory),
    )
