"""The draft-and-verify loop: propose a tree, judge it with one forward, keep a path of it.

A method is a pytree of choices, whose structure picks the program and whose leaves are data:

    drafter      who proposes what may come next?    decode/speculative/drafters/
    acceptance   which of it is kept?                decode/speculative/accept.py
    sampling     what distribution is the text drawn from?    decode/core/sampling.py
    controller   how many drafts are worth judging?           decode/speculative/controller.py

Without a drafter (`NoDraft`) this is plain autoregressive decoding, one token per forward.

Rows are independent: each has its own length, its own accepted path, its own end. What the target
draws at a position follows from the row's key and the position alone, so with `Match` a text
depends neither on the drafter nor on how many drafts are judged, whether it is greedy or drawn.
Between rounds the cache covers all tokens of a row but its last one, the root, which is judged
together with the drafts under it. A token lies in the cache slot of its position.

Letters: B rows, S cache slots, G completion positions, W tree nodes, J largest depth, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from decode.core import loop
from decode.speculative.accept import Walk
from decode.speculative.commit import commit
from decode.speculative.contracts import Context, Drafter, Proposal, Seen, no_proposal
from decode.speculative.controller import ControllerState
from decode.speculative.judge import Judged, existing, judge_tree
from decode.speculative.method import GREEDY, SpeculativeMethod
from decode.speculative.state import SpeculativeState, context_of, init_state, prefill
from decode.speculative.tree import DraftTree
from dlm.cache import compact
from dlm.config import ModelConfig
from dlm.params import Params

__all__ = [
    "GREEDY",
    "SpeculativeMethod",
    "SpeculativeState",
    "begin_round",
    "decode",
    "drafted",
    "end_round",
    "init_state",
    "prefill",
    "step",
    "stream",
]


def step(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> SpeculativeState:
    """One round. Pure; rows that are done stay as they are."""
    if method.controller is not None:
        return _controlled(params, cfg, method, state)
    return end_round(params, cfg, method, *begin_round(params, cfg, method, state))


def begin_round(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> tuple[SpeculativeState, Proposal, Judged]:
    """The first half of a round: a tree is drafted and judged; nothing is written."""
    with jax.named_scope("draft"):
        proposal = _propose(cfg, method, state, context_of(params, method, state))
    state, proposal = _take_cache(state, proposal)
    with jax.named_scope("judge"):
        judged = judge_tree(params, cfg, method, state, proposal)
    return state, proposal, judged


def end_round(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState,
    proposal: Proposal, judged: Judged,
) -> SpeculativeState:  # fmt: skip
    """The second half: of what was judged a path is kept."""
    context = context_of(params, method, state)
    return _keep_path(cfg, method, state, context, proposal, judged)


def _controlled(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> SpeculativeState:
    """One round, in which as many drafts are judged as the controller says: one program per width.

    The root alone is one branch, whether somebody drafted or not, unless the drafter has rows of
    its own, which only rounds with drafts read.
    """
    drafter, controller, control = method.drafter, method.controller, state.control
    assert controller is not None and control is not None
    context = context_of(params, method, state)
    most = controller.most_forwards(drafter, control, context.active)
    context = context.replace(most_forwards=most)
    whole = jnp.arange(drafter.num_nodes, dtype=jnp.int32)[None]
    whole = jnp.broadcast_to(whole, (len(state.length), drafter.num_nodes))
    draft = functools.partial(_propose, cfg, method, state, context)

    def ask(
        carry: tuple[Proposal, jax.Array, jax.Array],
    ) -> tuple[Proposal, jax.Array, jax.Array]:
        before, _ = _take_cache(state.replace(drafter=carry[0].state), carry[0])
        with jax.named_scope("draft"):
            proposal = _propose(cfg, method, before, context.replace(cache=before.cache))
        with jax.named_scope("choose"):
            choice, nodes = controller.choose(drafter, control, proposal, context.active)
        return proposal, choice, nodes

    is_asked = controller.asks(drafter, control, context.active)
    nothing = no_proposal(draft, context, state.drafter), jnp.zeros((), jnp.int32), whole
    proposal, choice, nodes = loop.in_place(is_asked, ask, nothing)
    state, proposal = _take_cache(state, proposal)

    def judge(width: int, has_extra: bool, state: SpeculativeState) -> SpeculativeState:
        kept = jnp.sort(nodes[:, :width], axis=1)
        tree, extra = proposal.tree, proposal.extra if has_extra else None
        if width < drafter.num_nodes:
            tree = tree.take(kept)
            extra = extra and extra.take(kept, drafter.num_extra_beside(width))
        chosen = proposal.replace(tree=tree, extra=extra, state=state.drafter)
        context = context_of(params, method, state)
        learn = functools.partial(controller.learn, drafter, control, choice, proposal, kept)
        is_paused = None if has_extra or width > 1 else ~is_asked
        return _settle(cfg, method, state, context, chosen, learn, is_paused)

    has_extra, widths = drafter.num_extra > 0, controller.widths_of(drafter)
    shapes = [(1, False), *((width, has_extra) for width in widths if has_extra or width > 1)]
    at = [0, *(shapes.index((w, has_extra)) for w in widths)]
    chosen = jnp.array(at)[choice]
    state = state.replace(drafter=proposal.state)
    for i, shape in enumerate(shapes):
        state = loop.in_place(chosen == i, functools.partial(judge, *shape), state)
    return state


def _propose(
    cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState, context: Context
) -> Proposal:
    """What the drafter proposes, of tokens that the target has."""
    proposal = method.drafter.propose(cfg, context, state.drafter)
    tree = existing(proposal.tree, method.drafter.depth, cfg.vocab_size)
    return proposal.replace(tree=tree)


def _take_cache(state: SpeculativeState, proposal: Proposal) -> tuple[SpeculativeState, Proposal]:
    """The cache that a drafter has written to is the state's: there is never a second one."""
    if proposal.cache is None:
        return state, proposal
    return state.replace(cache=proposal.cache), proposal.replace(cache=None)


def _settle(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    context: Context,
    proposal: Proposal,
    learn: Callable[[Walk, jax.Array], ControllerState] | None = None,
    is_paused: jax.Array | None = None,
) -> SpeculativeState:
    """The second half of a round: judges n nodes, and keeps a path of them.

    Args:
      cfg, method, state, context: of the round.
      proposal: whose tree is judged.
      learn: what the controller has seen then, of a walk and active rows; None without one.
      is_paused: [] bool. Whether nobody drafted; None: somebody did.
    """
    with jax.named_scope("judge"):
        judged = judge_tree(context.params, cfg, method, state, proposal)
    return _keep_path(cfg, method, state, context, proposal, judged, learn, is_paused)


def _keep_path(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    context: Context,
    proposal: Proposal,
    judged: Judged,
    learn: Callable[[Walk, jax.Array], ControllerState] | None = None,
    is_paused: jax.Array | None = None,
) -> SpeculativeState:
    """Keeps a path of n nodes that were `judged`; the other arguments are those of `_settle`."""
    drafter, tree, extra = method.drafter, proposal.tree, proposal.extra
    output, verdict, log_probs, top = judged
    n = tree.tokens.shape[1]
    depth = min(drafter.depth, n - 1)
    with jax.named_scope("accept"):
        walk = method.acceptance.walk(verdict, depth)
        rest = ((0, 0), (0, drafter.depth - depth))
        walk = walk.replace(path=jnp.pad(walk.path, rest, mode="edge"))
    with jax.named_scope("commit"):
        start, cache = state.length - 1, output.cache
        assert cache is not None
        if not drafter.is_chain and n > 1:
            cache = compact(cache, start, walk.path)
        of_path = lambda x: jnp.take_along_axis(x, walk.path[..., None], axis=1)  # noqa: E731
        seen = Seen(
            tokens=jnp.take_along_axis(tree.tokens, walk.path, axis=1),
            hidden=of_path(output.hidden),
            start=start,
            count=walk.num_accepted + 1,
            features=None if output.features is None else of_path(output.features),
            tree_hidden=output.hidden[:, :n],
            tree=tree,
            chosen=verdict.chosen,
            extra_hidden=None if extra is None else output.hidden[:, -extra.tokens.shape[1] :],
            best=None if top is None else top.tokens[..., : drafter.num_best],
            last=walk.path[:, -1],
            probs=verdict.probs if drafter.needs_probs else None,
        )
        control = state.control if learn is None else learn(walk, context.active)
        if top is not None:
            top = jax.tree.map(lambda x: x[..., : method.top_logprobs], top)
        state = commit(cfg, method, state, proposal, walk, log_probs, top)
        remembers = _observe(cfg, drafter, context, seen, proposal.state, is_paused)
    return state.replace(cache=cache, drafter=remembers, control=control)


def _observe(
    cfg: ModelConfig,
    drafter: Drafter,
    context: Context,
    seen: Seen,
    state: Any,
    is_paused: jax.Array | None,
) -> Any:
    """What the drafter remembers."""
    observe, pause = (
        functools.partial(see, cfg, context, seen) for see in (drafter.observe, drafter.pause)
    )
    if is_paused is None or not drafter.notices_pauses:
        return observe(state)
    if drafter.num_extra:  # its rows were not read
        return pause(state)
    return loop.in_place(~is_paused, observe, loop.in_place(is_paused, pause, state))


@functools.partial(jax.jit, static_argnames=("cfg",))
def drafted(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> DraftTree:
    """What the next round will judge, if no controller chooses among it; the state stays."""
    return _propose(cfg, method, state, context_of(params, method, state)).tree


decode = loop.compile_decode(step)  # its arguments are said there
_step_jitted = loop.compile_step(step)


def stream(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: SpeculativeState
) -> Iterator[SpeculativeState]:
    """Yields the state after every round: the same rounds as `decode`, at Python's pace.

    A yielded state must be read before the next one is asked for: its buffers are donated.
    """
    return loop.stream(_step_jitted, params, cfg, method, state)
