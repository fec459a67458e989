"""Draft and verify under a constraint that only the host knows; see `decode.constraints.hosted`.

A round judges a draft tree as it always does. The host then goes down the tree with the constraint,
each step a new state of it, and sees what the target has chosen behind each node:

    allowed      nothing goes to the device: with the same random numbers the target would choose it
                 among what is allowed, too
    not allowed  a mask goes there, with which the target chooses again, and the round ends

So texts are those of a target whose law is masked at every token, token for token what they are
without drafts, and states of what is rejected are forgotten. A target that draws through top-k,
top-p or min-p has the mask before these filters, and acceptance rules that test drafts against laws
have masked laws: then every node that can be reached gets its mask, if that rules anything out.
Drafts may come from a law without a mask, as such rules accept and reject by the law that drafts
were drawn from: those that are not allowed are drawn for nothing.

Letters: B rows, W tree nodes, J largest depth, V vocabulary, G completion positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from decode.constraints.hosted import Follower, HostConstraint, Masks, State, follow, pack
from decode.core.component import as_kind
from decode.core.loop import FOREVER
from decode.speculative.contracts import Proposal
from decode.speculative.judge import Judged, read_tree
from decode.speculative.loop import (
    SpeculativeMethod,
    SpeculativeState,
    begin_round,
    end_round,
    init_state,
    prefill,
)
from dlm.config import ModelConfig
from dlm.params import Params


class Hosted(SpeculativeMethod):
    """A method under a constraint; `host` makes one.

    Attributes:
      follower: knows the constraint, and the states of texts. Static.
    """

    follower: Follower | None = struct.field(pytree_node=False, default=None)

    def validate(self, cfg: ModelConfig) -> None:
        super().validate(cfg)
        if self.follower is None:
            raise ValueError("follower=None must be one: decode.speculative.hosted.host makes it")
        if self.controller is not None:
            raise ValueError("controller must be None with a constraint: rounds wait for the host")

    @property
    def at_device(self) -> SpeculativeMethod:
        """All that the device needs to know."""
        return as_kind(SpeculativeMethod, self)

    @property
    def is_lazy(self) -> bool:
        """Whether it is enough to mask where the target's choice is not allowed."""
        return not (self.sampling.is_cut or self.acceptance.needs_probs or self.drafter.needs_probs)


def host(method: SpeculativeMethod, constraint: HostConstraint) -> Hosted:
    """A method whose texts obey a constraint."""
    return as_kind(Hosted, method, follower=follow(constraint, method.sampling))


class HostedState(SpeculativeState):
    """What is carried from round to round; states of the constraint follow from the tokens.

    Attributes:
      num_masked: [B] int32. Rounds that sent a mask.
      num_released: [B] int32. How often nothing was allowed, so that the constraint was released.
    """

    num_masked: jax.Array
    num_released: jax.Array


def prepare(
    params: Params, cfg: ModelConfig, method: Hosted, prompts: Sequence[Sequence[int]], **asked: Any
) -> HostedState:
    """The state before the first round, with all prompts read.

    The arguments, and errors, are those of `decode.speculative.loop.init_state`.
    """
    method.validate(cfg)
    plain = method.at_device
    state = prefill(params, cfg, plain, init_state(cfg, plain, prompts, **asked))
    none = jnp.zeros_like(state.length)
    return as_kind(HostedState, state, num_masked=none, num_released=jnp.copy(none))


def decode(
    params: Params,
    cfg: ModelConfig,
    method: Hosted,
    state: HostedState,
    max_rounds: int = FOREVER,
    max_done: int = FOREVER,
) -> HostedState:
    """Rounds until every row is done.

    The arguments are those of `decode.core.loop.compile_decode`; the state is given away.
    """
    follower, plain = method.follower, method.at_device
    assert follower is not None
    known = state.has_stopped, state.tokens, state.length, state.prompt_len
    done, tokens, length, prompt_len = map(np.array, jax.device_get(known))
    find = _on_the_way if method.is_lazy else _everywhere
    num_released = np.zeros(done.size, np.int32)
    states = {
        b: follower.state_of(tokens[b, : length[b]], int(prompt_len[b]))
        for b in np.flatnonzero(~done).tolist()
    }
    for _ in range(max_rounds):
        if done.sum() >= min(max_done, done.size):
            break
        state, proposal, judged = judge(params, cfg, plain, state)
        tree = proposal.tree
        said = jax.device_get((judged[1].chosen, tree.tokens, tree.parents, tree.is_valid))
        masks, last = [], np.full(done.size, -1, np.int32)
        for b in np.flatnonzero(~done).tolist():
            found, last[b] = find(follower, states[b], _Said(*(x[b] for x in said)))
            masks += [(b, node, mask) for node, mask in found]
        state, news = settle(params, cfg, plain, state, proposal, judged, pack(masks), last)
        written, count, stopped = jax.device_get(news)
        for b in np.flatnonzero(~done).tolist():
            for token in written[b, : count[b]].tolist():
                num_released[b] += follower.constraint.advance(states[b], token) is None
                states[b] = follower.follow(states[b], token)
            tokens[b, length[b] : length[b] + count[b]] = written[b, : count[b]]
            length[b] += count[b]
        done = stopped
    for b, own in states.items():
        follower.remember(tokens[b, : length[b]], int(prompt_len[b]), own)
    return state.replace(num_released=state.num_released + num_released)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def judge(
    params: Params, cfg: ModelConfig, method: SpeculativeMethod, state: HostedState
) -> tuple[HostedState, Proposal, Judged]:
    """The state with what was read in its cache, the drafts, and what the target says of them."""
    begun, proposal, judged = begin_round(params, cfg, method, state)
    output, verdict, log_probs, top = judged
    read: Any = begun.replace(cache=output.cache, drafter=None)
    return read, proposal, (dataclasses.replace(output, cache=None), verdict, log_probs, top)


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
def settle(
    params: Params,
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: HostedState,
    proposal: Proposal,
    judged: Judged,
    masks: Masks | None,
    last: jax.Array,
) -> tuple[HostedState, tuple[jax.Array, jax.Array, jax.Array]]:
    """Keeps a path of the drafts, of what is allowed, and writes.

    Args:
      params, cfg, method, state: of the round.
      proposal, judged: of `judge`.
      masks: what may stand behind some nodes; None: behind none there is a mask.
      last: [B] int32. The node behind which the round ends at the latest; -1: any.

    Returns:
      The state; tokens that were written [B, J + 1], how many of these [B], and who is done [B].
    """
    (B, W), (output, verdict, log_probs, top) = proposal.tree.tokens.shape, judged
    goes_on = proposal.tree.parents != last[:, None]
    tree = proposal.tree.replace(is_valid=proposal.tree.is_valid & (goes_on | (last < 0)[:, None]))
    if masks is not None:
        allowed = masks.spread(B, W)
        verdict, log_probs, top = read_tree(
            params, cfg, method, state, tree, output.hidden, allowed
        )
    output, before = dataclasses.replace(output, cache=state.cache), state.length
    judged = output, verdict.replace(tree=tree), log_probs, top
    new: Any = end_round(params, cfg, method, state, proposal.replace(tree=tree), judged)
    if masks is not None:
        is_masked = jnp.zeros(B, bool).at[masks.row].set(True, mode="drop")
        new = new.replace(num_masked=new.num_masked + is_masked)
    place = before[:, None] + jnp.arange(method.drafter.depth + 1)[None]
    written = jnp.take_along_axis(new.tokens, place, axis=1, mode="clip")
    return new, (written, new.length - before, jnp.copy(new.has_stopped))


class _Said(NamedTuple):
    """What the host sees of a row: [W] each.

    `chosen` is what the target puts behind each node, the others are of the tree.
    """

    chosen: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    is_valid: np.ndarray


_Found = tuple[list[tuple[int, np.ndarray]], int]  # masks by node, and the last node; -1: any


def _on_the_way(follower: Follower, state: State, said: _Said) -> _Found:
    """The one mask that is needed where the target's own choices are followed, if any is."""
    node = 0
    while True:
        token = int(said.chosen[node])
        following = _advance(follower, state, token)
        if following is None:
            state, mask = follower.open(state)
            if not mask[token]:
                return [(node, mask)], node
            following = follower.follow(state, token)
        state = following
        is_next = (said.parents == node) & said.is_valid & (said.tokens == token)
        if not is_next.any():
            return [], -1
        node = int(np.argmax(is_next))


def _everywhere(follower: Follower, state: State, said: _Said) -> _Found:
    """Masks of all nodes that can be reached, where they rule anything out."""
    masks, states = [], dict[int, State]()
    for node in np.flatnonzero(said.is_valid).tolist():
        behind: State | None = state
        if node:
            above = states.get(int(said.parents[node]))
            behind = None if above is None else _advance(follower, above, int(said.tokens[node]))
        if behind is None:  # its token is not allowed: nobody comes here
            continue
        states[node], mask = follower.open(behind)
        if not mask.all():
            masks.append((node, mask))
    return masks, -1


def _advance(follower: Follower, state: State, token: int) -> State | None:
    """As the constraint does; None for tokens that are ruled out beside it, too."""
    if follower.never is not None and follower.never[token]:
        return None
    return follower.constraint.advance(state, token)
