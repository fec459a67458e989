"""The writing half of a round: what was accepted is text.

Letters: B rows, W tree nodes, J largest depth, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from decode.core.results import TopTokens
from decode.speculative.accept import Walk
from decode.speculative.contracts import Proposal
from decode.speculative.method import SpeculativeMethod
from decode.speculative.state import SpeculativeState
from dlm.config import ModelConfig


def commit(
    cfg: ModelConfig,
    method: SpeculativeMethod,
    state: SpeculativeState,
    proposal: Proposal,
    walk: Walk,
    log_probs: jax.Array,
    top: TopTokens | None,
) -> SpeculativeState:
    """Writes what was accepted and the token behind it, up to an end."""
    tree = proposal.tree
    B, G = state.step_map.shape
    J = walk.path.shape[1] - 1
    index = jnp.arange(J + 1)[None]
    drafts = jnp.take_along_axis(tree.tokens, jnp.roll(walk.path, -1, axis=1), axis=1)
    written = jnp.where(index < walk.num_accepted[:, None], drafts, walk.bonus[:, None])
    ids = jnp.asarray(method.stop_ids, jnp.int32).reshape(-1)
    ids = jnp.append(ids, jnp.asarray(cfg.eos_ids, jnp.int32))
    is_end = (written[..., None] == ids[None, None]).any(axis=-1)
    count = jnp.minimum(walk.num_accepted + 1, state.end - state.length)
    has_end = (is_end & (index < count[:, None])).any(axis=1)
    count = jnp.where(has_end, jnp.argmax(is_end, axis=1) + 1, count)
    active = ~state.has_stopped
    count = jnp.where(active, count, 0)

    rows = jnp.arange(B)[:, None]
    is_new = index < count[:, None]
    slot = jnp.where(is_new, state.length[:, None] + index, state.tokens.shape[1])
    place = jnp.where(is_new, state.length[:, None] - state.prompt_len[:, None] + index, G)
    of_path = log_probs[rows, walk.path]  # [B, J + 1] or [B, J + 1, V]
    if of_path.ndim == 3:
        of_path = jnp.take_along_axis(of_path, written[..., None], axis=2)[..., 0]
    reported = state.top
    if reported is not None and top is not None:
        best = jax.tree.map(lambda x: x[rows, walk.path], top)
        reported = reported.put(rows, place, best.tokens, best.log_probs)
    length = state.length + count
    accepted = jax.nn.one_hot(walk.num_accepted, J + 1, dtype=jnp.int32)
    occurred = state.occurred
    if occurred is not None:
        occurred = occurred.at[rows, jnp.where(is_new, written, cfg.vocab_size)].set(
            True, mode="drop"
        )
    return state.replace(
        tokens=state.tokens.at[rows, slot].set(written, mode="drop"),
        length=length,
        step_map=state.step_map.at[rows, place].set(state.num_forwards[:, None], mode="drop"),
        log_prob=state.log_prob.at[rows, place].set(of_path, mode="drop"),
        num_forwards=state.num_forwards + active,
        draft_forwards=state.draft_forwards + proposal.cost * active,
        acceptance_histogram=state.acceptance_histogram + accepted * active[:, None],
        has_stopped=state.has_stopped | has_end | (length >= state.end),
        occurred=occurred,
        top=reported,
        num_steps=state.num_steps + 1,
    )
